"""From a fresh overlay over real optimizer steps to peft's logits, and from the saved folder on to the next step: every method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.overlays import steps
from tests.overlays.cases import SMALL
from tests.overlays.live_peft import dequantised, make_base, padded_rows, peft_with_butterflies, torch, torch_base

from qtjax.checkpoints import load_adapter, load_pretrained, save_adapter
from qtjax.overlays import METHODS, init_overlay
from qtjax.training.state import Subject
from qtjax.tree import flatten

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures(peft_with_butterflies.__name__)]
peft = pytest.importorskip("peft")

# head_dim is hidden_size / heads, which peft's LLaMA-Adapter takes for granted.
BASE = dict(
    vocab_size=53, hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
    max_position_embeddings=64, initializer_range=0.15, bos_token_id=1, eos_token_id=2, sliding_window=5,
)  # fmt: skip
ROWS = padded_rows(BASE["vocab_size"], 20, 15)
TASKS = np.array([2, 0])
# Beside every method with small settings: those whose rule after a step acts within the three steps, and other forms.
OTHERS = {
    "adalora": ("adalora", SMALL["adalora"] | {"total_step": 4}),  # cuts at steps 2 and 3
    # projects at step 2; alpha's own rate is meant for learning rates near 1e-4, here it would close every gate in one step
    "diffprune": ("diffprune", SMALL["diffprune"] | {"total_step": 4, "kept_fraction": 0.1, "alpha_rate": 5.0}),
    "oft-coft": ("oft", {"oft_block_size": 4, "coft": True, "eps": 0.05}),
    "lora-pissa": ("lora", {"r": 3, "init_lora_weights": "pissa"}),
    "lora-ends": ("lora", {"r": 3, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head", "norm"]}),
    "vblora-topk": ("vblora", SMALL["vblora"] | {"save_only_topk_weights": True}),
    "ptuning-lstm": ("ptuning", SMALL["ptuning"] | {"encoder_reparameterization_type": "LSTM"}),
    "prefix-mlp": ("prefix", SMALL["prefix"] | {"prefix_projection": True, "encoder_hidden_size": 8}),
}  # fmt: skip
CASES = {name: (name, SMALL[name]) for name in METHODS} | OTHERS
# laplace is not PEFT's, but its mean is a LoRA that peft reads.
IN_PEFT = [name for name, (method, _) in CASES.items() if METHODS[method].in_peft]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{quantization: (folder for torch, config, params)}; torch's quantised base holds the values of the packed one."""
    plain = make_base(tmp_path_factory.mktemp("base"), "Mistral", BASE, 5)
    packed = load_pretrained(plain[0], quantization="nf4")
    return {None: plain, "nf4": (dequantised(tmp_path_factory.mktemp("nf4"), *packed), *packed)}


@pytest.fixture(scope="module")
def after(bases):
    """name -> (base, fresh overlay, overlay and state after three steps)."""
    made = {}

    def get(name):
        if name not in made:
            method, fields = CASES[name]
            base = bases["nf4" if method == "qlora" else None]
            fresh = init_overlay(method, *base[1:], jax.random.key(5), **fields)
            made[name] = base, fresh, *steps.trained(*base[1:], fresh, 3)
        return made[name]

    return get


def tasks_of(overlay):
    return {"task_ids": TASKS} if overlay.tasks else {}


def classifier_set_by_name(base_folder, folder):
    """peft's filter by adapter name ("0", "1", ...) drops classifier.layers.0 when it loads: experts by peft, classifier by hand."""
    base = torch_base(base_folder)
    base.config.use_cache = False
    adapters = {str(i): str(folder / f"expert_{i}") for i in range(SMALL["xlora"]["adapters"])}
    settings = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=adapters)
    model = peft.get_peft_model(base, settings).eval()
    own = {k.split("classifier.")[1]: w for k, w in model.named_parameters() if "internal_xlora_classifier" in k}
    saved = {k.split("classifier.")[1]: w for k, w in load_file(folder / "adapter_model.safetensors").items()}
    assert set(own) == set(saved)
    with torch.no_grad():
        for key, weight in own.items():
            weight.copy_(torch.tensor(saved[key]))
    return model


def loaded_by_peft(base_folder, folder):
    return peft.PeftModel.from_pretrained(torch_base(base_folder), folder).eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what peft says about norms, tied weights and seeds is test_*_peft's subject
@pytest.mark.parametrize("name, loader", [
    pytest.param(name, classifier_set_by_name if name == "xlora" else loaded_by_peft, id=name) for name in IN_PEFT
])  # fmt: skip
def test_three_steps_later_peft_computes_the_same(after, name, loader, tmp_path):
    """init -> three AdamW steps with the method's rule -> save_adapter -> peft loads it: same logits, which the steps moved."""
    (folder, config, params), fresh, overlay, _ = after(name)
    logits = ROWS.logits(config, params, overlay, **tasks_of(overlay))
    assert ROWS.apart(logits, ROWS.logits(config, params, fresh, **tasks_of(fresh))) > 0.05
    save_adapter(tmp_path, overlay, base_model_name=str(folder))
    model = loader(folder, tmp_path)
    theirs = ROWS.torch_logits(model, **{key: torch.tensor(ids) for key, ids in tasks_of(overlay).items()})
    print(f"{name}: apart {ROWS.apart(logits, theirs):.1e}")
    ROWS.close(logits, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_saved_folder_goes_on_as_what_was_kept(after, name, tmp_path):
    """Trainables, frozen arrays and what the method's rule decided come back bitwise; so does the next step, moments carried over."""
    (_, config, params), _, overlay, state = after(name)
    save_adapter(tmp_path, overlay)
    again = load_adapter(tmp_path, config, params)
    again = again.replace(method=overlay.method) if overlay.method == "qlora" else again  # its folder says LORA: base unknown
    assert again.method == overlay.method
    jax.tree.map(np.testing.assert_array_equal, (again.params, again.frozen), (overlay.params, overlay.frozen))
    kept, begun = (flatten(x.get("own", {})) for x in (state.method, Subject(config, again).method_state(again.params)))
    for path, value in kept.items():
        if value.dtype == jnp.bool_:  # which triplets are left, whether the support is fixed
            np.testing.assert_array_equal(begun[path], value, err_msg=path)
    goes_on = steps.step(config, params, overlay, state, 4)
    resumed = steps.step(config, params, again, steps.TrainState(again.params, state.optimizer, state.method), 4)
    jax.tree.map(np.testing.assert_array_equal, resumed, goes_on)
    assert any(not np.array_equal(value, flatten(overlay.params)[path]) for path, value in flatten(goes_on.trainable).items())


@pytest.mark.slow
@pytest.mark.parametrize("name, part, fraction", [("adalora", "lora_E", 2 / 4), ("diffprune", "delta", 0.1)])
def test_the_rules_after_a_step_have_acted(after, name, part, fraction):
    """What the tests above carry over is pruned: target_r of init_r triplets on average, kept_fraction of the differences."""
    _, _, overlay, _ = after(name)
    values = np.concatenate([np.asarray(x).ravel() for path, x in flatten(overlay.params).items() if path.endswith(part)])
    assert np.count_nonzero(values) == round(fraction * values.size)
