"""Which modules are edited, and every refusal: names, regexes, layers, fields."""

import re

import jax
import pytest

from qtjax import models
from qtjax.errors import QtjaxError
from qtjax.overlays import abstract_overlay, init_overlay

CONFIG = models.ModelConfig(
    vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=12, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8,
)  # fmt: skip
ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def edited(**fields):
    """{(module, layer)} that an overlay with these fields edits."""
    overlay = abstract_overlay("lora", CONFIG, r=2, **fields)
    return {(s.linear.name, n) for s in overlay.spec.sites for n, rank in enumerate(s.ranks) if rank}


def product(names, layers=range(12)):
    return {(name, n) for name in names for n in layers}


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(), product(ALL)),
        (dict(target_modules="all-linear"), product(ALL)),
        (dict(target_modules="ALL-LINEAR"), product(ALL)),
        (dict(target_modules=["q_proj", "v_proj"]), product({"q_proj", "v_proj"})),
        (dict(target_modules={"q_proj", "v_proj"}), product({"q_proj", "v_proj"})),
        (dict(target_modules="q_proj, v_proj"), product({"q_proj", "v_proj"})),
        (dict(target_modules="q_proj"), product({"q_proj"})),
        (dict(target_modules=["mlp.up_proj"]), product({"up_proj"})),
        (dict(target_modules=["layers.1.mlp.up_proj"]), {("up_proj", 1)}),
        (dict(target_modules=["1.mlp.up_proj"]), {("up_proj", 1)}),
        (dict(target_modules=r".*\.(q|v)_proj"), product({"q_proj", "v_proj"})),
        (dict(target_modules=r".*\.1\.mlp\.\w+_proj"), product({"gate_proj", "up_proj", "down_proj"}, [1])),
        (dict(target_modules=r".*layers\.(0|1[01])\..*o_proj"), product({"o_proj"}, [0, 10, 11])),
        (dict(target_modules="model.layers.1..self_attn.q_proj"), product({"q_proj"}, [10, 11])),
        (dict(layers_to_transform=[0, 5]), product(ALL, [0, 5])),
        (dict(layers_to_transform=5), product(ALL, [5])),
        (dict(layers_to_transform=[]), product(ALL)),
        (dict(exclude_modules=["mlp.up_proj", "o_proj"]), product(ALL - {"up_proj", "o_proj"})),
        (dict(exclude_modules="q_proj"), product(ALL - {"q_proj"})),
        (dict(exclude_modules="q_proj, up_proj"), product(ALL - {"q_proj", "up_proj"})),
        (dict(exclude_modules=r".*\.mlp\..*"), product({"q_proj", "k_proj", "v_proj", "o_proj"})),
        (dict(target_modules=r".*", exclude_modules=r"(?!.*_proj).*"), product(ALL)),
    ],
)
def test_targets_select(fields, expected):
    """Names match whole dotted endings, a text is a regex for the whole module name, the head is never meant."""
    assert edited(**fields) == expected


@pytest.mark.parametrize("name, module", [("lm_head", "lm_head"), ("embed_tokens", "model.embed_tokens")])
def test_embedding_and_head_are_targets_where_the_method_edits_them(name, module):
    """lora takes them by name or regex, "all-linear" leaves them out as in PEFT; dora refuses them."""
    assert edited(target_modules=["q_proj", name]) == product({"q_proj"}) | {(name, 0)}
    assert edited(target_modules=rf"(.*\.)?{name}") == {(name, 0)}
    assert edited(target_modules=["q_proj", module], layers_to_transform=[3]) == {("q_proj", 3), (name, 0)}
    assert edited(target_modules=["q_proj", name], exclude_modules=[name]) == product({"q_proj"})
    assert edited(target_modules=["q_proj", name], modules_to_save=[name]) == product({"q_proj"})
    with pytest.raises(QtjaxError, match=f"matches '{module}', which is not a linear module of the layers; name only q_"):
        init_overlay("dora", CONFIG, None, jax.random.key(0), target_modules=["q_proj", name])


def test_layers_to_transform_leaves_the_embedding_out_as_peft_does():
    """A name that is only an ending does not reach outside the layers once layers are chosen."""
    assert edited(target_modules=["q_proj", "embed_tokens"], layers_to_transform=[3]) == {("q_proj", 3)}


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(target_modules="q_prj"), "'q_prj' matches no linear module; did you mean 'q_proj'"),
        (dict(target_modules=["q_proj", "w_proj"]), "'w_proj' matches no linear module; did you mean"),
        (dict(target_modules=["proj"]), "'proj' matches no linear module"),
        (dict(target_modules=r".*q_prj.*"), "matches no linear module.*a text is a regex"),
        (dict(target_modules=r"q_proj|k_proj"), "matches no linear module.*a text is a regex"),
        (dict(target_modules="q_proj("), "not a valid regular expression"),
        (dict(target_modules=["q_proj", "norm"]), "matches 'model.norm'.*not a linear module.*down_proj, embed_tokens, lm_head"),
        (dict(target_modules=["mlp"]), "matches 'model.layers.0.mlp'"),
        (dict(target_modules=r".*layernorm"), "matches 'model.layers.0.input_layernorm'"),
        (dict(target_modules=""), "must name at least one module"),
        (dict(target_modules=[]), "must name at least one module"),
        (dict(target_modules=3), "target_modules = 3: must be a text or a list of texts"),
        (dict(layers_to_transform=[12]), "layers_to_transform = 12: the model has layers 0 to 11"),
        (dict(layers_to_transform="0"), "layers_to_transform = '0'"),
        (dict(target_modules=r".*q_proj", layers_to_transform=[1]), "needs target_modules as a list of names"),
        (dict(exclude_modules="q_porj"), "exclude_modules: 'q_porj' matches no module; did you mean 'q_proj'"),
        (dict(exclude_modules=["o_proj", "q_porj"]), "exclude_modules: 'q_porj' matches no module; did you mean 'q_proj'"),
        (dict(exclude_modules=r".*q_prj.*"), "exclude_modules: .* matches no module"),
        (dict(exclude_modules=ALL), "matches no linear module that exclude_modules"),
        (dict(r=0), "r = 0: must be an integer above 0"),
        (dict(r=2.0), "r = 2.0"),
        (dict(r=True), "r = True"),
        (dict(r=9, target_modules="k_proj"), "r = 9: model.layers.0.self_attn.k_proj is 16 x 8.*at most 8"),
        (dict(rank_pattern={"up_proj": 17}), "r = 17: model.layers.0.mlp.up_proj is 16 x 24"),
        (dict(rank_pattern={"up_proj": 0}), r"rank_pattern\['up_proj'\] = 0"),
        (dict(rank_pattern={"up_prj": 2}), "rank_pattern: 'up_prj' matches no edited module; did you mean 'up_proj'"),
        (dict(alpha_pattern={"up_proj": "a"}), r"alpha_pattern\['up_proj'\] = 'a': must be a number"),
        (dict(alpha_pattern=["up_proj"]), "alpha_pattern = .*must map"),
        (dict(lora_alpha="16"), "lora_alpha = '16': must be a number"),
        (dict(lora_alpha=float("nan")), "lora_alpha = nan"),
        (dict(lora_dropout=1.0), "lora_dropout = 1.0: is a fraction from 0 to below 1"),
        (dict(use_rslora=1), "use_rslora = 1: must be true or false"),
        (dict(init_lora_weights="eva"), "init_lora_weights = 'eva': is not supported; must be True, 'gaussian'"),
        (dict(init_lora_weights="pissa_niter_0"), "init_lora_weights = 'pissa_niter_0': is not supported"),
        (dict(init_lora_weights="loftq"), "init_lora_weights = 'loftq': is not supported"),
        (dict(init_lora_weights="orthogonal", r=3), "r = 3: must be even with init_lora_weights = 'orthogonal'"),
        (dict(init_lora_weights="pissa", lora_alpha=-1), "lora_alpha: must be above 0 with init_lora_weights = 'pissa'"),
        (dict(init_lora_weights=3), "init_lora_weights = 3: must be true, false or a name"),
        (dict(initial_factors="frozen"), "initial_factors = 'frozen': is not a field"),
        (dict(init_lora_weights=False), "init_lora_weights = False"),
        (dict(use_dora=True), "use_dora = True: is not supported"),
        (dict(bias="lora_only"), "bias = 'lora_only': is not supported"),
        (dict(lora_bias=True), "lora_bias = True: is not supported"),
        (dict(modules_to_save=["lm_hed"]), "modules_to_save: 'lm_hed' matches no module; did you mean 'lm_head'"),
        (dict(modules_to_save=["mlp"]), "modules_to_save: 'mlp' matches 'model.layers.0.mlp', which is not one weight"),
        (dict(modules_to_save=["v_proj", "k_proj"], target_modules=["v_proj"]), "matches no linear module"),
        (dict(modules_to_save=["_proj"], target_modules=["v_proj"]), "self_attn.v_proj is a target of the adapter"),
        (dict(layer_replication=[(0, 1)]), "layer_replication"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
        (dict(target_parameters=["x"]), "target_parameters"),
        (dict(eva_config={"rho": 2.0}), "eva_config"),
        (dict(lora_dropuot=0.1), "lora_dropuot = 0.1: is not a field that lora supports; did you mean 'lora_dropout'"),
        (dict(rank=3), "rank = 3: is not a field that lora supports"),
    ],
)
def test_refusals_name_field_value_and_remedy(fields, message):
    """Every bad or unsupported setting is one line that names it; none is ignored."""
    with pytest.raises(QtjaxError) as error:
        edited(**fields) if "r" not in fields else init_overlay("lora", CONFIG, None, jax.random.key(0), **fields)
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


def test_peft_fields_that_are_off_are_accepted():
    """PEFT's own defaults of unsupported fields pass, so a whole adapter_config.json can be given."""
    off = dict(use_dora=False, bias="none", modules_to_save=None, loftq_config={}, megatron_core="megatron.core")
    assert edited(**off, eva_config=None, layers_pattern=None, a_field_of_the_future=None) == product(ALL)


def test_a_tree_without_stacked_kernels_is_refused():
    """A parameter tree of another layout is an error, not an empty overlay."""
    with pytest.raises(QtjaxError, match="params: has no layers"):
        init_overlay("lora", CONFIG, {"norm": {"weight": jax.numpy.ones(3)}}, jax.random.key(0))
