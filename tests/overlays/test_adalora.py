"""AdaLoRA: its formula and penalty, the schedule by hand, files with pruned ranks, and peft itself on other models."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qtjax import models
from qtjax.checkpoints import adapter_state_dict, load_adapter, load_pretrained, save_adapter
from qtjax.errors import QtjaxError
from qtjax.overlays import init_overlay, merge, method_named
from qtjax.tree import flatten, unflatten

pytestmark = pytest.mark.slow

CONFIG = models.ModelConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, initializer_range=0.2,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 31, (2, 9))
KEY = jax.random.key(3)
METHOD = method_named("adalora")
SCHEDULE = dict(
    init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=2, total_step=12, lora_alpha=6,
    target_modules="q_proj,up_proj",
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return models.init_params(CONFIG, jax.random.key(0))


def random_trainables(overlay, seed=1, scale=0.3):
    """The overlay with every real entry random; layers that are not edited stay zero."""
    rng = np.random.default_rng(seed)
    flat = {}
    for leaf in METHOD.leaves(overlay.spec):
        real = leaf.mask()
        values = rng.normal(0, scale, leaf.shape).astype(np.float32)
        flat[leaf.path] = jnp.asarray(values if real is None else values * real)
    return overlay.replace(params=unflatten(flat))


def logits(params, overlay, config=CONFIG, ids=IDS, mask=None):
    return np.asarray(models.apply(config, params, ids, mask, overlay=overlay))


def masks(state):
    return {path: np.asarray(value) for path, value in flatten(state["kept"]).items()}


def drive(overlay, steps, gradient):
    """(params, state) after steps 1 ... of plain descent on given gradients, one compiled program for all of them."""
    traces = []

    @jax.jit
    def one(params, state, gradients, step):
        traces.append(1)
        params = jax.tree.map(lambda w, g: w - 0.05 * g, params, gradients)
        return METHOD.after_step(overlay.spec, params, state, gradients, step)

    trees, state, history = overlay.params, METHOD.state(overlay.spec, overlay.params), []
    for step in range(1, steps + 1):
        trees, state = one(trees, state, gradient(step), jnp.int32(step))
        history.append((trees, state))
    assert len(traces) == 1
    return history


def random_gradients(overlay):
    def gradient(step):
        return random_trainables(overlay, seed=100 + step, scale=1.0).params

    return gradient


def test_fresh_overlay_is_bitwise_the_base(params):
    """E = 0 changes no bit of the logits; A and B are N(0, 0.02^2)."""
    overlay = init_overlay("adalora", CONFIG, params, KEY, init_r=6, target_r=3)
    np.testing.assert_array_equal(logits(params, overlay), logits(params, None))
    for path, value in flatten(overlay.params).items():
        assert value.dtype == jnp.float32
        if path.endswith("lora_E"):
            assert not np.asarray(value).any()
        else:
            assert abs(np.asarray(value).std() / 0.02 - 1) < 0.25, path


@pytest.mark.parametrize("fields", [dict(), dict(layers_to_transform=[1]), dict(lora_alpha=0)])
def test_the_model_computes_with_w_plus_scaled_triplets(params, fields):
    """W + alpha / (init_r + 1e-5) A diag(E) B in numpy; init_r stands for an alpha of 0; other layers are untouched."""
    overlay = random_trainables(init_overlay("adalora", CONFIG, params, KEY, **(SCHEDULE | fields)), scale=0.6)
    kernels = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    parts = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(overlay.params).items()}
    for path in ("layers/self_attn/q_proj", "layers/mlp/up_proj"):
        for n in fields.get("layers_to_transform", range(3)):
            a, b, e = (parts[f"{path}/lora_{x}"][n] for x in "ABE")
            kernels[f"{path}/kernel"][n] += (fields.get("lora_alpha", 6) or 4) / (4 + 1e-5) * a @ np.diag(e) @ b
    by_hand = logits(unflatten({p: jnp.asarray(k, jnp.float32) for p, k in kernels.items()}), None)
    assert np.abs(by_hand - logits(params, None)).max() > 0.1
    np.testing.assert_allclose(logits(params, overlay), by_hand, atol=2e-4)
    merged_config, merged = merge(CONFIG, params, overlay)
    np.testing.assert_allclose(logits(merged, None, merged_config), by_hand, atol=2e-4)
    for n in {0, 1, 2} - set(fields.get("layers_to_transform", range(3))):
        new, old = (tree["layers"]["mlp"]["up_proj"]["kernel"][n] for tree in (merged, params))
        np.testing.assert_array_equal(new, old)


def test_penalty_is_the_mean_distance_from_orthogonality(params):
    """orth_reg_weight * mean |P P^T - I|_F over A and B of edited layers alone, with a finite slope at an orthogonal P."""
    fields = SCHEDULE | dict(layers_to_transform=[0, 2], orth_reg_weight=0.3)
    overlay = random_trainables(init_overlay("adalora", CONFIG, params, KEY, **fields))
    parts = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(overlay.params).items()}
    norms = []
    for path in ("layers/self_attn/q_proj", "layers/mlp/up_proj"):
        for n in (0, 2):
            for p in (parts[f"{path}/lora_A"][n].T, parts[f"{path}/lora_B"][n]):
                norms.append(np.linalg.norm(p @ p.T - np.eye(4)))
    np.testing.assert_allclose(float(overlay.penalty()), 0.3 * np.mean(norms), rtol=1e-5)
    flat = flatten(overlay.params)
    flat["layers/mlp/up_proj/lora_A"] = flat["layers/mlp/up_proj/lora_A"].at[0].set(jnp.eye(16, 4))
    slope = jax.grad(lambda p: overlay.replace(params=p).penalty())(unflatten(flat))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(slope))
    assert not np.asarray(flatten(slope)["layers/mlp/up_proj/lora_A"][1]).any()


def test_budget_falls_by_the_cubic_schedule(params):
    """All triplets until tinit, the cubic budget every deltaT steps, the target at total_step - tfinal, then no more."""
    overlay = random_trainables(init_overlay("adalora", CONFIG, params, KEY, **SCHEDULE))
    history = drive(overlay, 14, random_gradients(overlay))
    kept = [sum(int(mask.sum()) for mask in masks(state).values()) for _, state in history]
    by_hand = {4: 12 + int(12 * (1 - 2 / 6) ** 3), 6: 12 + int(12 * (1 - 4 / 6) ** 3), 8: 12}
    assert kept == [24] * 3 + [by_hand[4]] * 2 + [by_hand[6]] * 2 + [12] * 7
    for step, (trees, state) in enumerate(history, 1):
        zero = {path: np.asarray(flatten(trees)[path]) == 0 for path in masks(state)}
        for path, mask in masks(state).items():
            masked = step in (4, 6) or step >= 8
            np.testing.assert_array_equal(zero[path], ~mask if masked else np.zeros_like(mask), str(step))
    final = masks(history[7][1])
    assert all((masks(state)[path] == mask).all() for _, state in history[8:] for path, mask in final.items())


def test_the_lowest_scores_of_all_matrices_are_cut(params):
    """Importance and uncertainty by the paper's recursion in numpy, and one threshold over all layers and modules."""
    fields = SCHEDULE | dict(layers_to_transform=[0, 2], beta1=0.7, beta2=0.6)
    overlay = random_trainables(init_overlay("adalora", CONFIG, params, KEY, **fields))
    gradient = random_gradients(overlay)
    history = drive(overlay, 4, gradient)
    ipt, unc = {}, {}
    for step in range(1, 5):
        before = overlay.params if step == 1 else history[step - 2][0]
        slopes = {path: np.asarray(g, np.float64) for path, g in flatten(gradient(step)).items()}
        for path, weight in flatten(before).items():
            seen = np.abs((np.asarray(weight, np.float64) - 0.05 * slopes[path]) * slopes[path])
            ipt[path] = 0.7 * ipt.get(path, 0) + 0.3 * seen
            unc[path] = 0.6 * unc.get(path, 0) + 0.4 * np.abs(seen - ipt[path])
    scores = {}
    for path in ("layers/self_attn/q_proj", "layers/mlp/up_proj"):
        a, b, e = (ipt[f"{path}/lora_{x}"] * unc[f"{path}/lora_{x}"] for x in "ABE")
        scores[f"{path}/lora_E"] = (e + a.mean(1) + b.mean(2))[[0, 2]]
    threshold = np.sort(np.concatenate([s.ravel() for s in scores.values()]))[16 - (8 + int(8 * (4 / 6) ** 3)) - 1]
    for path, mask in masks(history[3][1]).items():
        np.testing.assert_array_equal(mask[[0, 2]], scores[path] > threshold)
    state = history[3][1]
    for path, value in flatten(state["exp_avg_unc"]).items():
        np.testing.assert_allclose(value, unc[path], rtol=1e-4, atol=1e-7)


def test_no_pruning_where_the_target_is_the_start(params):
    """target_r = init_r leaves every triplet, where peft's own allocator fails."""
    overlay = random_trainables(init_overlay("adalora", CONFIG, params, KEY, **(SCHEDULE | dict(target_r=4))))
    for trees, _ in drive(overlay, 12, random_gradients(overlay)):
        assert all(np.asarray(v).all() for p, v in flatten(trees).items() if p.endswith("lora_E"))


def test_pruned_overlay_is_saved_sliced_and_goes_on_exactly(params, tmp_path):
    """rank_pattern and slices are those of E != 0, the trainables come back bitwise, the state starts from what is left."""
    overlay = random_trainables(init_overlay("adalora", CONFIG, params, KEY, **SCHEDULE))
    trees, state = drive(overlay, 12, random_gradients(overlay))[-1]
    pruned = overlay.replace(params=trees)
    save_adapter(tmp_path, pruned)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert set(pattern) == {f"model.layers.{n}.{m}.lora_E" for n in range(3) for m in ("self_attn.q_proj", "mlp.up_proj")}
    file = load_file(tmp_path / "adapter_model.safetensors")
    for key, marks in pattern.items():
        full = adapter_state_dict(pruned)
        rows, name = np.flatnonzero(marks), f"base_model.model.{key.removesuffix('lora_E')}"
        np.testing.assert_array_equal(np.asarray(marks), full[f"{name}lora_E"][:, 0] != 0)
        np.testing.assert_array_equal(file[f"{name}lora_A"], full[f"{name}lora_A"][rows])
        np.testing.assert_array_equal(file[f"{name}lora_B"], full[f"{name}lora_B"][:, rows])
    again = load_adapter(tmp_path, CONFIG, params)
    jax.tree.map(np.testing.assert_array_equal, again.params, pruned.params)
    jax.tree.map(np.testing.assert_array_equal, METHOD.state(again.spec, again.params)["kept"], state["kept"])
    (tmp_path / "qtjax_trainable.safetensors").unlink()
    alone = load_adapter(tmp_path, CONFIG, params)
    np.testing.assert_array_equal(logits(params, alone), logits(params, pruned))
    save_adapter(tmp_path / "second", alone)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_fresh_overlay_is_saved_whole_and_keeps_its_open_schedule(params, tmp_path):
    """E = 0 everywhere is not pruned; total_step = 0 is written as what peft takes, read as 0, and refused by a step."""
    overlay = init_overlay("adalora", CONFIG, params, KEY, init_r=3, target_r=2, tinit=5, tfinal=7)
    save_adapter(tmp_path, overlay)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["rank_pattern"] is None and written["total_step"] == 13
    again = load_adapter(tmp_path, CONFIG, params)
    assert again.spec == overlay.spec and again.spec.fields.total_step == 0
    assert all(mask.all() for mask in masks(METHOD.state(overlay.spec, overlay.params)).values())
    with pytest.raises(QtjaxError, match="total_step = 0: .*set total_step"):
        METHOD.after_step(overlay.spec, overlay.params, METHOD.state(overlay.spec, overlay.params), overlay.params, 1)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(r=4), "r = 4: is not used by adalora; set init_r"),
        (dict(init_r=0), "init_r = 0: must be an integer above 0"),
        (dict(init_r=17, target_r=4), r"init_r = 17: layers/self_attn/q_proj is 16 x 16.*at most 16"),
        (dict(init_r=4, target_r=5), "target_r = 5: must be at most init_r = 4"),
        (dict(init_r=4, target_r=2, tinit=8, tfinal=4, total_step=12), "tinit = 8: leaves no step for pruning"),
        (dict(init_r=4, target_r=2, beta1=1.0), "beta1 = 1.0: is a fraction above 0 and below 1"),
        (dict(init_r=4, target_r=2, beta2=0.0), "beta2 = 0.0"),
        (dict(init_r=4, target_r=2, orth_reg_weight=-1), "orth_reg_weight = -1: must be a number of 0 or more"),
        (dict(init_r=4, target_r=2, deltaT=0), "deltaT = 0"),
        (dict(init_r=4, target_r=2, use_dora=True), "use_dora = True: is not supported for adalora"),
        (dict(init_r=4, target_r=2, alpha_pattern={"q_proj": 3}), "alpha_pattern = .*is not supported for adalora"),
        (dict(init_r=4, target_r=2, rank_pattern={"q_proj": 3}), "rank_pattern = .*is written by training"),
        (dict(init_r=4, target_r=2, init_lora_weights=False), "init_lora_weights = False: must be True"),
    ],
)
def test_refusals_name_field_value_and_remedy(fields, message):
    """Impossible and unsupported settings are one line."""
    with pytest.raises(QtjaxError) as error:
        init_overlay("adalora", CONFIG, None, KEY, target_modules="q_proj", **fields)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize(
    "pattern, message",
    [
        ({"model.layers.0.self_attn.q_prj.lora_E": [True] * 4}, "q_prj.lora_E' is no edited module; did you mean"),
        ({"model.layers.0.self_attn.q_proj.lora_E": [True] * 3}, "must be init_r = 4 times true or false"),
        ({"model.layers.0.self_attn.q_proj.lora_E": [1, 0, 1, 1]}, "must be init_r = 4 times true or false"),
        ([True], "rank_pattern = .*must map"),
    ],
)
def test_a_wrong_rank_pattern_is_refused(params, tmp_path, pattern, message):
    """A rank_pattern for other modules or ranks is an error, not a wrong slice."""
    save_adapter(tmp_path, init_overlay("adalora", CONFIG, params, KEY, **SCHEDULE))
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"rank_pattern": pattern}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(QtjaxError, match=message):
        load_adapter(tmp_path, CONFIG, params)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["llama-adalora", "llama-adalora-pruned"])
def test_peft_s_recorded_file_alone_computes_the_same_and_is_written_again(shared, tmp_path, name):
    """Without our file of trainables peft's slices give the recorded logits, and saving gives its tensors and settings."""
    folder = shared / "peft_refs" / name
    config, params = load_pretrained(folder)
    overlay = load_adapter(folder, config, params)
    inputs = np.load(folder / "inputs.npz")
    real = inputs["attention_mask"] == 1
    got = logits(params, overlay, config, inputs["input_ids"], inputs["attention_mask"])
    assert np.abs(got - inputs["logits"])[real].max() <= 2e-4
    save_adapter(tmp_path, overlay)
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, folder))
    assert set(ours) == set(theirs)
    for key in theirs:
        np.testing.assert_array_equal(ours[key], theirs[key])
    new, old = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, folder))
    for field in set(new) & set(old):
        value, other = (sorted(v) if isinstance(v, list) else v for v in (new[field], old[field]))
        assert value == other, field
