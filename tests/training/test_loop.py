"""The loop against the textbook: packing, accumulation, pruning and compilation change nothing they should not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qtjax import models
from qtjax.errors import QtjaxError
from qtjax.training.batch import microbatches, survivors, whole_samples
from qtjax.training.ladder import cut, ladder
from qtjax.tree import flatten

def naive_loss_sum(config, params, batch, weights):
    """Sum of nll over weights, one sample a row, full logits, log_softmax."""
    real = np.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]
    logits = models.apply(config, params, jnp.asarray(batch.input_ids), jnp.asarray(real))
    logp = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    nll = -jnp.take_along_axis(logp, jnp.asarray(batch.input_ids)[:, 1:, None], axis=-1)[..., 0]
    return (nll * weights[:, 1:]).sum()


def worst(a, b) -> float:
    """Largest difference between two trees relative to the second one's largest entry, leaf by leaf."""
    a, b = flatten(a), flatten(b)
    return max(float(jnp.abs(a[p] - b[p]).max() / (jnp.abs(b[p]).max() + 1e-12)) for p in b)


def test_ladder_and_cut_by_hand():
    """Shapes halve and stay multiples of the devices; a count is cut with the fewest empty rows."""
    assert ladder(8, 1, 3) == (8, 4, 2)
    assert ladder(8, 8, 4) == (8,)
    assert ladder(6, 2, 2) == (6, 4)
    assert cut(7, (4, 2, 1)) == [4, 2, 1]
    assert cut(5, (4,)) == [4, 4]
    assert cut(0, (4, 2)) == []
    assert cut(3, (4, 2)) == [2, 2]


def test_packed_and_accumulated_gradients_are_those_of_one_plain_batch(opened):
    """Loss and gradient of packed microbatches, summed, equal the padded full-logits batch (float32 summation noise)."""
    session = opened()
    loop = session.loop
    prepared = loop.prepare(0)
    weights = prepared.batch.targets.astype(np.float32)
    expected, gradient = jax.value_and_grad(
        lambda p: naive_loss_sum(session.subject.config, p, prepared.batch, weights)
    )(loop.state.trainable)
    parts = loop.pack(whole_samples(prepared.batch))
    assert len(parts) > 1 and any((p.rows["segment_ids"] > 1).any() for p in parts)
    got, loss = loop.gradients(parts, 0)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert worst(got, gradient) < 1e-4


def test_token_scores_stand_where_their_samples_have_them(opened):
    """Every target's score in [N, T] is the one that the packed row gave it; all other slots are 0."""
    loop = opened(**{"prune.batch_size": 20}).loop
    prepared = loop.prepare(2)  # 8 samples and 12 of padding
    expected = np.zeros((2, *prepared.batch.targets.shape), np.float32)
    for part in prepared.scoring:
        rows = {name: jnp.asarray(each) for name, each in part.rows.items()}
        scores = loop.programs.score[part.size](loop.state.trainable, loop.frozen, rows)
        for r, t in np.argwhere(part.sample >= 0):
            for out, values in zip(expected, scores):
                out[part.sample[r, t], part.rows["position_ids"][r, t]] = values[r, t]
    np.testing.assert_array_equal(np.asarray(loop.token_scores(prepared)[0]), expected)
    assert ((expected != 0) == prepared.batch.targets).all()


def test_cutting_after_the_last_kept_target_changes_no_gradient(opened):
    """Mask mode: survivors cut and packed give the gradient of whole samples whose pruned targets weigh nothing."""
    session = opened()
    loop = session.loop
    prepared = loop.prepare(0)
    tokens = np.asarray(loop.score(prepared, 0).decision.tokens)
    assert 0 < tokens.sum() < prepared.batch.targets.sum()
    expected, gradient = jax.value_and_grad(
        lambda p: naive_loss_sum(session.subject.config, p, prepared.batch, tokens.astype(np.float32))
    )(loop.state.trainable)
    parts = loop.pack(survivors(prepared.batch, tokens, session.config.prune))
    assert sum(p.tokens for p in parts) < sum(p.tokens for p in prepared.scoring)
    got, loss = loop.gradients(parts, 0)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert worst(got, gradient) < 1e-4


def test_a_full_data_step_is_the_textbook_adamw_step(opened):
    """Without pruning one step equals optax.adamw on the clipped mean gradient of the plain batch."""
    session = opened(**{"prune.sample_pruner": "none", "prune.token_pruner": "none", "train.warmup_fraction": 0.0, "train.weight_decay": 0.1})
    loop, start = session.loop, jax.tree.map(jnp.copy, session.loop.state.trainable)
    batch = loop.prepare(0).batch
    weights = batch.targets.astype(np.float32)
    gradient = jax.grad(lambda p: naive_loss_sum(session.subject.config, p, batch, weights) / weights.sum())(start)
    rate = optax.cosine_decay_schedule(1e-2, session.total_steps)
    matrices = jax.tree_util.tree_map_with_path(lambda path, _: "weight" not in str(path[-1]), start)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1, mask=matrices))
    changes, _ = optimizer.update(gradient, optimizer.init(start), start)
    loop.step(0, session.total_steps)
    # Adam's first step is sign(g) * rate: compare where |g| is far above its noise
    for path, expected in flatten(optax.apply_updates(start, changes)).items():
        clear = np.abs(flatten(gradient)[path]) > 1e-5
        np.testing.assert_allclose(flatten(loop.state.trainable)[path][clear], expected[clear], atol=2e-5, err_msg=path)


def test_nothing_compiles_after_warm_up(opened):
    """Steps with different numbers of survivors launch only what was compiled before the first step."""
    session = opened(**{"prune.sample_keep": 0.5, "train.shapes": 3, "train.row_length": 48})
    loop = session.loop
    loop.step(0, session.total_steps)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    used = set()
    for step in range(1, session.total_steps):
        used.add(loop.step(step, session.total_steps)[0]["trained_slots"])
    assert len(used) > 1
    assert compiled == []


def test_budgets_and_counts_of_a_step(opened):
    """K = floor(keep x real samples) survive, counts add up, and records hold exactly the real samples."""
    session = opened(**{"prune.sample_keep": 0.5})
    metrics, records = session.loop.step(0, session.total_steps)
    assert metrics["samples"] == 16 and metrics["kept_samples"] == 8
    assert metrics["kept_q2"] + metrics["kept_q4"] + metrics["kept_q3"] + metrics["supplement"] == 8
    assert sum(metrics[f"supplement_median_q{q}"] for q in (1, 2, 3, 4)) == metrics["supplement"]
    assert records["keep"].sum() == 8 and records["kept_tokens"].sum() == metrics["kept_tokens"]
    assert (records["kept_tokens"] > 0).sum() == 8
    assert metrics["trained_tokens"] <= metrics["trained_slots"]
    last = session.total_steps // 2 - 1  # 48 training rows: the third batch is full, so take the padded case below
    assert session.loop.step(last, session.total_steps)[0]["samples"] == 16


def test_the_last_batch_of_an_epoch_is_padded_not_dropped(opened):
    """48 samples in batches of 20: three steps, the last over 8 samples keeping half of the real ones."""
    session = opened(**{"prune.batch_size": 20})
    assert session.loop.plan.steps_per_epoch == 3
    metrics, records = session.loop.step(2, session.total_steps)
    assert metrics["samples"] == 8 and metrics["kept_samples"] == 4
    assert (records["row"] >= 0).sum() == 8


def test_drop_mode_trains_on_shorter_sequences(opened):
    """In drop mode pruned targets leave the input: fewer real tokens than mask mode for the same decision."""
    session = opened(**{"prune.token_keep": 0.3, "prune.sample_keep": 1.0})
    loop = session.loop
    prepared = loop.prepare(0)
    tokens = np.asarray(loop.score(prepared, 0).decision.tokens)
    dropped = session.config.prune.__class__(mode="drop")
    mask = sum(p.tokens for p in loop.pack(survivors(prepared.batch, tokens, session.config.prune)))
    parts = microbatches(survivors(prepared.batch, tokens, dropped), loop.shapes, loop.row_length, 1)
    assert sum(p.tokens for p in parts) < mask
    assert sum(p.rows["weights"].sum() for p in parts) == tokens.sum()


def test_lora_trains_the_overlay_and_leaves_the_base(opened):
    """Only the overlay's tree is trained; the frozen base stays bitwise the checkpoint."""
    session = opened(**{"overlay.method": "lora", "overlay.r": 4})
    loop = session.loop
    before = jax.tree.map(np.asarray, loop.frozen["params"])
    start = jax.tree.map(lambda x: jnp.array(x, copy=True), loop.state.trainable)  # the state is donated
    for step in range(3):
        loop.step(step, session.total_steps)
    for path, leaf in flatten(loop.frozen["params"]).items():
        np.testing.assert_array_equal(leaf, flatten(before)[path])
    assert worst(loop.state.trainable, start) > 1e-3


def test_dropout_reaches_the_step(opened):
    """lora_dropout changes a step's gradient, and the same seed gives the same one again."""
    norms = []
    for rate, folder in ((0.0, "a"), (0.5, "b"), (0.5, "c")):
        flags = {"overlay.method": "lora", "overlay.lora_dropout": rate, "prune.sample_pruner": "none", "prune.token_pruner": "none"}
        session = opened(**flags, **{"run.folder": f"{opened.root}/{folder}"})
        norms.append(session.loop.step(0, session.total_steps)[0]["grad_norm"])
    assert norms[0] != pytest.approx(norms[1], rel=1e-3) and norms[1] == norms[2]


def test_scores_that_are_nan_stop_the_run(opened):
    """A model that yields NaN is not a batch without targets: the run stops and says so."""
    session = opened()
    weight = session.loop.state.trainable["norm"]["weight"]
    session.loop.state.trainable["norm"]["weight"] = weight.at[0].set(jnp.nan)
    with pytest.raises(QtjaxError, match="step 1: the scores of 16 samples are NaN"):
        session.loop.step(0, session.total_steps)


def test_what_would_train_wrong_in_silence_is_refused(opened):
    """More tokens than positions, and full-parameter training in 16 bits."""
    with pytest.raises(QtjaxError, match="data.max_length = 256.*128 positions"):
        opened(**{"data.max_length": 256, "train.row_length": 256})
    with pytest.raises(QtjaxError, match="model.param_dtype = 'bfloat16'.*float32"):
        opened(**{"model.param_dtype": "bfloat16", "run.folder": f"{opened.root}/other"})


def test_a_diverged_loss_stops_with_step_and_remedy(opened):
    """A loss that is not finite ends the run with one line naming the step and what to try."""
    session = opened(**{"train.learning_rate": 1e30, "train.warmup_fraction": 0.0, "train.clip_norm": 0.0})
    with pytest.raises(QtjaxError, match=r"step \d+: loss .*learning_rate"):
        for step in range(session.total_steps):
            session.loop.step(step, session.total_steps)


def test_a_step_without_targets_is_skipped_and_counted(opened):
    """No kept target: the parameters stay as they are, and the step says skipped = 1."""
    session = opened(**{"prune.sample_pruner": "none", "prune.token_pruner": "none"})
    loop = session.loop
    before = jax.tree.map(np.asarray, loop.state.trainable)
    prepared = loop.prepare(0)
    prepared.batch.targets[:] = False
    loop.prepare = lambda step: prepared
    metrics, _ = loop.step(0, session.total_steps)
    assert metrics["skipped"] == 1 and metrics["kept_tokens"] == 0
    assert worst(loop.state.trainable, before) == 0


def test_schedules_go_on_over_a_step_without_targets(opened):
    """A skipped step counts: the next one has the learning rate that is logged, and AdaLoRA comes to its end.

    * Its last cut is due after step 4, which has no target: the budget of ranks is met all the same.
    * Moments and averages, which know gradients only, stay as they are.
    """
    session = opened(**{
        "prune.sample_pruner": "none", "overlay.method": "adalora", "overlay.fields": "init_r=4 target_r=2 deltaT=4",
        "train.max_steps": 4, "train.shapes": 1, "train.clip_norm": 0.0,
    })  # fmt: skip
    loop, true_prepare = session.loop, session.loop.prepare
    assert session.total_steps == 4

    def prepare(step):
        prepared = true_prepare(step)
        prepared.batch.targets[:] &= step not in (1, 3)
        return prepared

    def host():
        return jax.tree.map(np.array, (loop.state.trainable, loop.state.method["own"], optax.tree.get(loop.state.optimizer, "mu")))

    def ranks():
        return sum(int(np.count_nonzero(x)) for p, x in flatten(loop.state.trainable).items() if p.endswith("lora_E"))

    loop.prepare = prepare
    assert loop.step(0, 4)[0]["skipped"] == 0
    before = host()
    assert loop.step(1, 4)[0]["skipped"] == 1 and loop.state.method["step"] == 2
    jax.tree.map(np.testing.assert_array_equal, host(), before)
    rate = loop.step(2, 4)[0]["learning_rate"]
    mean, square = (optax.tree.get(loop.state.optimizer, name) for name in ("mu", "nu"))
    for path, start in flatten(before[0]).items():
        if not path.endswith("lora_E"):  # no rule but AdamW's, whose second step this is
            m, v = np.asarray(flatten(mean)[path]) / (1 - 0.9**2), np.asarray(flatten(square)[path]) / (1 - 0.999**2)
            change = np.asarray(flatten(loop.state.trainable)[path]) - start
            np.testing.assert_allclose(change, -rate * m / (np.sqrt(v) + 1e-8), rtol=1e-3, atol=1e-6, err_msg=path)
    left, averages = ranks(), host()[1]["exp_avg_ipt"]
    assert loop.step(3, 4)[0]["skipped"] == 1 and loop.state.method["step"] == 4
    assert ranks() == 2 * sum(x.shape[0] for p, x in flatten(before[0]).items() if p.endswith("lora_E")) < left
    jax.tree.map(np.testing.assert_array_equal, host()[1]["exp_avg_ipt"], averages)
