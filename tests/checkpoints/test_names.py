"""The table between the parameter tree and the names of checkpoints is one to one and complete."""

from qtjax.checkpoints import names
from qtjax.models import ModelConfig, abstract_params
from qtjax.tree import flatten

TINY = ModelConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=12, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, attention_bias=True, mlp_bias=True,
)  # fmt: skip


def test_table_is_bijective():
    """Every leaf and layer has one torch name and one Flax name, and each name leads back to it."""
    tree = abstract_params(TINY)
    found = names.places(tree)
    expected = {
        (path, layer)
        for path, leaf in flatten(tree).items()
        for layer in (range(leaf.shape[0]) if path.startswith("layers/") else (None,))
    }
    assert {(p.path, p.layer) for p in found.values()} == expected and len(found) == len(expected)
    flax = set()
    for name, place in found.items():
        assert names.hf_name(place.path, place.layer) == name and names.place(name) == place
        flax.add(names.flax_name(place.path, place.layer))
        assert names.from_flax_name(names.flax_name(place.path, place.layer)) == name
    assert len(flax) == len(found)


def test_hand_written_names():
    """Spelled out: the names that transformers writes, which matrices are turned, and the order of the model."""
    place = names.place("model.layers.11.self_attn.q_proj.weight")
    assert place == names.Place("layers/self_attn/q_proj/kernel", 11, True)
    assert names.place("model.layers.0.mlp.down_proj.bias") == names.Place("layers/mlp/down_proj/bias", 0, False)
    assert names.place("model.embed_tokens.weight") == names.Place("embed_tokens/embedding", None, False)
    assert names.place("lm_head.weight") == names.Place("lm_head/kernel", None, True)
    assert names.flax_name("layers/mlp/up_proj/kernel", 3) == "model/layers/3/mlp/up_proj/kernel"
    assert names.flax_name("embed_tokens/embedding") == "model/embed_tokens/embedding"
    assert names.stored_shape((12, 16, 24), names.place("model.layers.2.mlp.up_proj.weight")) == (24, 16)
    order = list(names.places(abstract_params(TINY)))
    assert order[0] == "model.embed_tokens.weight" and order[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(n.split(".")[2]) for n in order if ".layers." in n]
    assert layers == sorted(layers) and layers[-1] == 11


def test_strangers_have_no_place():
    """Names that only look alike are unknown, never guessed."""
    for name in (
        "model.layers.01.mlp.up_proj.weight",
        "model.layers.x.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.up_proj.weight_scale",
        "model.layers.{i}.mlp.up_proj.weight",
        "layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "lm_head.bias",
        "model.norm.bias",
        "model.embed_tokens.bias",
        "",
    ):
        assert names.place(name) is None, name
    assert names.from_flax_name("model/layers/0/mlp/up_proj/weight") is None
    assert names.from_flax_name("model/norm/kernel") is None
