"""Polytropon and X-LoRA: what they are at the start, what tasks and gates do, and how they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.overlays.tiny_model import CONFIG, IDS, base_params, logits, shaken, trained

from qtjax import models
from qtjax.checkpoints import load_adapter, save_adapter
from qtjax.errors import QtjaxError
from qtjax.overlays import init_overlay, merge

POLY = dict(r=2, n_tasks=3, n_skills=2, n_splits=2)


@pytest.fixture(scope="module")
def params():
    return base_params()


def of_task(overlay, params, tasks, ids=IDS, **more):
    return np.asarray(models.apply(CONFIG, params, ids, overlay=overlay, task_ids=tasks, **more))


def test_fresh_mixtures_are_the_base(params):
    """Poly's B and fresh experts' B are zero, so that neither changes a bit of the logits."""
    plain = logits(params)
    np.testing.assert_array_equal(of_task(init_overlay("poly", CONFIG, params, jax.random.key(0), **POLY), params, np.array([0, 2])), plain)
    np.testing.assert_array_equal(logits(params, init_overlay("xlora", CONFIG, params, jax.random.key(0), r=2, use_trainable_adapters=True)), plain)


def test_every_token_may_have_its_own_task(params):
    """In a packed row each segment follows its task, as it would alone; a task changes what is computed."""
    overlay = trained("poly", params, **POLY)
    assert np.abs(of_task(overlay, params, np.array([0, 0])) - of_task(overlay, params, np.array([1, 1]))).max() > 0.05
    segments = np.repeat([[1, 2]], [6, 5], axis=1)
    positions = np.concatenate([np.arange(6), np.arange(5)])[None]
    tasks = np.where(segments == 1, 2, 0)
    packed = of_task(overlay, params, tasks, IDS[:1], segment_ids=segments, position_ids=positions)
    alone = [of_task(overlay, params, np.array([t]), IDS[:1, part]) for t, part in ((2, slice(0, 6)), (0, slice(6, 11)))]
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), atol=3e-5)


def test_poly_formula(params):
    """One module of one layer, by hand in float64: x W + x A_t B_t / r with gates normalised over the skills."""
    overlay = trained("poly", params, target_modules=["v_proj"], **POLY)
    own = {k: np.asarray(v, np.float64)[1] for k, v in overlay.params["layers"]["self_attn"]["v_proj"].items()}
    z = 1 / (1 + np.exp(-own["module_logits"][2])).reshape(2, 2)
    z /= z.sum(-1, keepdims=True) + 1e-12
    a = np.einsum("qs,qsdr->qdr", z, own["poly_lora_A"]).reshape(-1, 2)
    b = np.einsum("qs,qsrd->rqd", z, own["poly_lora_B"]).reshape(2, -1)
    x = np.random.default_rng(0).normal(size=(1, 4, 32))
    edit = overlay.expand(task_ids=jnp.array([2])).tree["layers"]["self_attn"]["v_proj"]["edit"]
    got = jax.tree.map(lambda v: v[1], edit).side(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, x @ a @ b / 2, rtol=1e-4, atol=1e-5)


def test_poly_draws_its_gates_in_training_only(params):
    """With a key gates are drawn, the same for the same key; without one they are the sigmoid's."""
    overlay = trained("poly", params, **POLY)
    assert overlay.draws
    hidden = [
        np.asarray(models.hidden_states(CONFIG, params, jnp.asarray(IDS), overlay=overlay, task_ids=jnp.array([0, 1]), rng=key))
        for key in (None, jax.random.key(1), jax.random.key(1), jax.random.key(2))
    ]
    np.testing.assert_array_equal(hidden[1], hidden[2])
    assert min(np.abs(hidden[0] - hidden[1]).max(), np.abs(hidden[1] - hidden[3]).max()) > 1e-2


def test_one_expert_with_weight_one_is_that_lora(params):
    """A softmax over a single expert gives one: X-LoRA of one expert computes what the LoRA computes."""
    expert = trained("lora", params, r=3)
    alone = init_overlay("xlora", CONFIG, params, jax.random.key(0), adapters=[expert])
    np.testing.assert_allclose(logits(params, alone), logits(params, expert), atol=2e-5)


def test_top_k_takes_the_rest_out(params):
    """With top_k_lora = 1 and no softmax the other expert's values play no part."""
    experts = [trained("lora", params, seed=s, r=2) for s in (1, 2)]
    overlay = init_overlay("xlora", CONFIG, params, jax.random.key(0), adapters=experts, top_k_lora=1, enable_softmax=False)
    bias = overlay.params["classifier"]["0"]["bias"]
    overlay = overlay.replace(params={"classifier": {"0": {"kernel": jnp.zeros_like(overlay.params["classifier"]["0"]["kernel"]), "bias": bias.at[:].set(jnp.array([1.0, 0.5]))}}})
    np.testing.assert_allclose(logits(params, overlay), logits(params, experts[0]), atol=2e-5)


def test_generation_runs_both_passes_with_caches(params):
    """Greedy tokens of X-LoRA and of poly, with caches, are the argmax of full forward passes."""
    xlora = shaken(init_overlay("xlora", CONFIG, params, jax.random.key(0), r=2, use_trainable_adapters=True))
    for overlay, tasks in ((xlora, None), (trained("poly", params, **POLY), jnp.array([1, 2]))):
        new = np.asarray(models.generate(CONFIG, params, IDS, max_new_tokens=5, eos_token_id=(), overlay=overlay, task_ids=tasks))
        rows = np.concatenate([IDS, new], axis=1)
        full = of_task(overlay, params, tasks, rows)
        np.testing.assert_array_equal(full[:, IDS.shape[1] - 1 : -1].argmax(-1), new)


@pytest.mark.parametrize("method, fields, message", [
    ("poly", dict(n_splits=5), "n_splits = 5: must divide the 32 inputs"),
    ("poly", dict(n_tasks=0), "n_tasks = 0: must be an integer above 0"),
    ("xlora", dict(adapters=[1]), "adapters = \\[1\\]: must be a list of lora overlays"),
    ("xlora", dict(adapters=0), "adapters = 0"),
    ("xlora", dict(r=2), "adapters = 3: fresh experts add nothing and stay frozen"),
    ("xlora", dict(adaptors=3), "adaptors = 3.*did you mean 'adapters'"),
    ("xlora", dict(top_k_lora=4), "top_k_lora = 4: there are 3 experts"),
    ("xlora", dict(enable_softmax_topk=True), "enable_softmax_topk = True: needs top_k_lora"),
    ("xlora", dict(hidden_size=7), "hidden_size = 7: the base model's is 32"),
    ("xlora", dict(scaling_pass_value=0.5), "scaling_pass_value = 0.5: is not supported"),
])  # fmt: skip
def test_refusals(params, method, fields, message):
    """One line: field, value, rule."""
    with pytest.raises(QtjaxError, match=message) as error:
        init_overlay(method, CONFIG, params, jax.random.key(0), **fields)
    assert "\n" not in str(error.value)


def test_experts_that_the_mixture_does_not_compute_are_refused(params):
    """DoRA, subtracted initial factors, copies and the head are named; so are settings beside given experts."""
    for expert in (
        init_overlay("dora", CONFIG, params, jax.random.key(0)),
        init_overlay("lora", CONFIG, params, jax.random.key(0), init_lora_weights="pissa"),
        init_overlay("lora", CONFIG, params, jax.random.key(0), modules_to_save=["lm_head"]),
        init_overlay("lora", CONFIG, params, jax.random.key(0), target_modules=["q_proj", "lm_head"]),
    ):
        with pytest.raises(QtjaxError) as error:
            init_overlay("xlora", CONFIG, params, jax.random.key(0), adapters=[expert])
        assert "\n" not in str(error.value)
    with pytest.raises(QtjaxError, match="have their own"):
        init_overlay("xlora", CONFIG, params, jax.random.key(0), adapters=[trained("lora", params, r=2)], r=3)
    with pytest.raises(QtjaxError, match="hold 9 to 9"):
        merge(CONFIG, params, trained("poly", params, **POLY), task_id=9)


def test_tasks_must_be_said_and_known(params, tmp_path):
    """Several tasks and none named, an unknown task, and an expert folder that is not there: one line each."""
    overlay = trained("poly", params, **POLY)
    for tasks, message in ((None, "task_ids: the overlay has 3 tasks"), (np.array([0, 3]), "0 to 3; the overlay's tasks are 0 to 2")):
        with pytest.raises(QtjaxError, match=message):
            models.apply(CONFIG, params, IDS, overlay=overlay, task_ids=tasks)
    save_adapter(tmp_path / "x", init_overlay("xlora", CONFIG, params, jax.random.key(0), r=2, use_trainable_adapters=True))
    (tmp_path / "x" / "expert_1").rename(tmp_path / "gone")
    with pytest.raises(QtjaxError, match="missing: .*expert_1"):
        load_adapter(tmp_path / "x", CONFIG, params)
