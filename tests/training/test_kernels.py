"""What a run says of its attention is what it takes."""

import io
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from qtjax import models
from qtjax.data.packing import Sample, pack
from qtjax.models.attention import Segments, attend, kernel_for, visible
from qtjax.training.kernels import segments_for, with_segments
from qtjax.training.programs import _in_dtype
from qtjax.training.run import open_session
from qtjax.training.run_folder import RunFolder
from qtjax.training.setup import check_overlay
from qtjax.training.state import Subject

SMALL = models.ModelConfig(
    vocab_size=8, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16
)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "blocks"),
        ({"overlay.method": "lora", "overlay.r": 2}, "blocks"),
        ({"overlay.method": "prompt", "overlay.fields": "num_virtual_tokens=2"}, "xla, since blocks takes no virtual tokens"),
        ({"overlay.method": "prefix", "overlay.fields": "num_virtual_tokens=2"}, "xla, since blocks takes no virtual tokens"),
        ({"prune.token_pruner": "fastv"}, "blocks; scoring xla, since fastv reads the weights"),
    ],
)
def test_a_run_says_which_attention_it_takes(tiny_config, monkeypatch, changes, said):
    """The second line names the kernel, or plain attention and why; while its programs were traced the kernel ran, or did not."""
    from qtjax.models import attention

    ran, own = [], attention.blockwise
    monkeypatch.setattr(attention, "blockwise", lambda *a, **b: ran.append(1) or own(*a, **b))
    config, told = tiny_config(**changes), io.StringIO()
    with RunFolder.open(config) as folder:
        open_session(config, folder, Console(file=told, width=200)).close()
    assert f"attention: {said}\n" in told.getvalue()
    assert bool(ran) == said.startswith("blocks")


def test_a_run_told_of_samples_trains_the_same(tiny_config, tmp_path, monkeypatch, runs_by_mask):
    """Where cuDNN's kernel is told of two samples of a row at most, no row of a run holds more, and its losses are plain attention's."""
    from qtjax.models import attention
    from qtjax.training import batch, run

    held: list[int] = []
    asked: list[tuple] = []
    monkeypatch.setattr(batch, "fill_rows", lambda *a, own=batch.fill_rows: held.append(max(map(len, a[1]))) or own(*a))
    monkeypatch.setattr(attention, "by_runs", runs_by_mask)

    def losses(name, mode="mask", **promised):
        def with_promise(subject, mesh, lengths, row_length, rows, keep):
            asked.append((mesh.size, len(lengths), int(lengths.max()), row_length, rows, keep))
            return replace(subject, config=subject.config.replace(**promised))

        monkeypatch.setattr(run, "with_segments", with_promise)
        config, told = tiny_config(**{"run.folder": str(tmp_path / name), "prune.mode": mode, "prune.token_keep": 0.4}), io.StringIO()
        with RunFolder.open(config) as folder:
            session = open_session(config, folder, Console(file=told, width=200))
            found = [session.loop.step(i, session.total_steps)[0]["loss"] for i in range(2)]
            session.close()
        return found, told.getvalue()

    plain, _ = losses("plain", attention="xla")
    assert max(held) > 2
    held.clear()
    told, said = losses("told", attention="cudnn", max_segments=2)
    assert max(held) == 2 and "attention: cudnn, by sample, at most 2 in a row\n" in said
    np.testing.assert_allclose(told, plain, rtol=1e-5)
    losses("drop", "drop", attention="xla")
    size, count, longest, *others = zip(*asked)
    assert set(size) == {1} and len(set(count)) == 1 and max(longest) <= 48  # lengths of the data
    assert list(zip(*others)) == [(64, 4, 1.0), (64, 4, 1.0), (64, 4, 0.4)]  # row_length, rows, keep


def card(capability, size=1, memory=80 * 2**30):
    """As much of a mesh as is looked at."""
    facts = {"compute_capability": capability} if capability else {}
    device = type("Device", (), facts | {"memory_stats": lambda self: {"bytes_limit": memory}})()
    return type("Mesh", (), {"devices": np.array([device]), "size": size})()


def test_cudnn_is_told_of_samples_where_it_can_be(monkeypatch):
    """On one Hopper GPU with memory for it; elsewhere and for other kernels by mask."""
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    subject = Subject(SMALL.replace(dtype="bfloat16", attention="cudnn"), None)
    whole, halves = np.full(40, 512), np.full(40, 256)

    def most(mesh, lengths=halves, subject=subject, rows=8, **more):
        return with_segments(subject, mesh, lengths, 512, rows, **more).config.max_segments

    assert most(card("9.0")) == 2 and most(card("9.0"), whole) == 1 and most(card("9.0"), whole, keep=0.5) == 2
    assert {most(mesh) for mesh in (card("8.9"), card("10.0"), card("9.0", 2), card(None), card("gfx90a"))} == {0}
    # 3 runs x 8 x 512 slots x (8 bytes x 32 columns + 4 bytes x 2 heads x 8 layers) are 3.75 MiB, a sixteenth of 60; 8 layers or, recomputed, 1
    deep = Subject(subject.config.replace(num_hidden_layers=8), None)
    assert [most(card("9.0", memory=mib * 2**20), subject=deep) for mib in (60, 59)] == [2, 0]
    again = Subject(deep.config.replace(remat="full"), None)
    assert [most(card("9.0", memory=mib * 2**20), subject=again) for mib in (50, 49)] == [2, 0]
    assert most(card("9.0", memory=0), whole) == 1  # rows of one sample need none
    assert most(card("9.0"), subject=Subject(subject.config.replace(attention="xla"), None)) == 0
    assert most(card("9.0"), subject=Subject(subject.config.replace(sliding_window=100), None)) == 0
    shared = Subject(subject.config.replace(num_key_value_heads=1), None)
    assert most(card("9.0"), subject=shared) == 2
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))  # offsets of shared keys are wrong there
    assert most(card("9.0"), subject=shared) == 0 and most(card("9.0"), whole, shared) == 1 and most(card("9.0")) == 2


def test_held_out_rows_are_packed_by_their_own_lengths(monkeypatch):
    """What training's rows may hold says nothing of held-out samples: short ones share rows, and the kernel is promised nothing of them."""
    from qtjax.evals import rows

    seen = []

    def scores(config, params, overlay, given, mesh, rater):
        seen.append((config.max_segments, given["segment_ids"].max()))
        return [np.ones(given["segment_ids"].shape)] * 2

    monkeypatch.setattr(rows, "_token_scores", scores)
    samples = [Sample(np.arange(4, dtype=np.int32), np.ones(4, bool), np.arange(4, dtype=np.int32))] * 8
    found = rows.likelihood(SMALL.replace(attention="cudnn", max_segments=1), {}, samples, row_length=16, rows=8)
    assert seen == [(0, 4)] and found.targets.tolist() == [3] * 8


def test_a_posterior_is_fitted_with_plain_attention(monkeypatch):
    """JAX cannot run cuDNN's backward pass for many outputs at once: the fit and its predictions get "xla", whoever asks; others stay."""
    from qtjax.training import calibration

    seen = []
    monkeypatch.setattr(calibration, "first_tokens", lambda *_: np.arange(2))
    monkeypatch.setattr(calibration, "prompts", lambda *_: calibration.Prompts(np.zeros((1, 2)), np.ones((1, 2)), np.zeros(1, int)))
    monkeypatch.setattr(calibration, "fit_laplace", lambda config, *_, **__: seen.append(config) or "fitted")
    config = SMALL.replace(attention="cudnn", max_segments=4)
    assert calibration.fit_posterior(config, {}, None, None)[0] == "fitted" and calibration.calibrate(config, {}, None, None, None) == ("fitted", None)
    calibration.fit_posterior(SMALL.replace(attention="blocks"), {}, None, None)
    assert [(each.attention, each.max_segments) for each in seen] == [("xla", 0), ("xla", 0), ("blocks", 0)]


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_keep_the_mask(tiny_config, method):
    """Beside a prompt or a prefix no row is cut for a kernel that does not run."""
    config = tiny_config(**{"overlay.method": method, "overlay.fields": "num_virtual_tokens=2"})
    subject = Subject(SMALL.replace(dtype="bfloat16", attention="cudnn"), check_overlay(config, SMALL))
    assert with_segments(subject, card("9.0"), np.full(40, 512), 512, 8) is subject
    alone = replace(subject, overlay=check_overlay(tiny_config(**{"overlay.method": "lora", "overlay.r": 2}), SMALL))
    assert with_segments(alone, card("9.0"), np.full(40, 512), 512, 8).config.max_segments == 1


def test_a_row_may_hold_as_many_samples_as_cost_no_rows():
    """The fewest by which at most 3 % more rows are needed, by hand for equal lengths; short samples among long ones ask for more; 0 beyond 16."""
    assert [segments_for(np.full(100, n), 512) for n in (512, 257, 256, 128, 65, 64, 33, 32, 30)] == [1, 1, 2, 4, 8, 8, 16, 16, 0]
    assert segments_for(np.full(100, 512), 512, keep=0.25) == 4
    mixed = np.array([500] * 25 + [40] * 75)
    most = segments_for(mixed, 512)
    assert most > 2 and len(pack(mixed, 512, most)) <= 1.03 * len(pack(mixed, 512)) < len(pack(mixed, 512, most // 2))


def test_rows_that_cudnn_refuses_take_plain_attention():
    """An odd number of slots, heads wider than 128 or of no whole eight: no error, and the numbers of plain attention."""
    config = SMALL.replace(dtype="bfloat16", attention="cudnn")
    assert [kernel_for(config.replace(head_dim=dim), 2, length) for dim, length in ((16, 64), (16, 63), (20, 64), (256, 64))] == ["cudnn", "xla", "xla", "xla"]
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 7, 2, 16)).astype(np.float32)
    slots, segment = jnp.arange(7), jnp.ones((1, 7), jnp.int32)
    sees = visible(slots, slots, segment, segment, None)
    plain = attend(config.replace(attention="xla"), q, k, v, sees)
    np.testing.assert_array_equal(attend(config, q, k, v, sees), plain)
    blocks = attend(config.replace(attention="blocks"), q, k, v, Segments(segment, jnp.zeros((1, 7), jnp.int32)))
    np.testing.assert_allclose(blocks, plain, atol=2e-6)


def test_what_cudnn_gave_is_kept_where_products_are(monkeypatch):
    """Its kernel runs once in a backward pass with remat dots, as with none, and twice with full, which keeps nothing of a layer."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)  # traced, not run
    ids = np.zeros((2, 8), np.int32)

    def kernels(remat):
        config = SMALL.replace(dtype="bfloat16", attention="cudnn", remat=remat)
        slope = jax.grad(lambda params: models.hidden_states(config, params, ids).astype(jnp.float32).sum())
        text = str(jax.make_jaxpr(slope)(models.init_params(config, jax.random.key(0))))
        return text.count("dot_product_attention_fwd_wrapper["), text.count("dot_product_attention_bwd_wrapper[")

    assert [kernels(remat) for remat in ("none", "dots", "full")] == [(1, 1), (1, 1), (2, 1)]


class _Mesh:
    """As much of a mesh as is looked at."""

    def __init__(self, platform):
        self.devices = np.array([type("Device", (), {"platform": platform})()])


def test_a_scoring_pass_in_another_dtype_has_that_ones_kernel():
    """cuDNN takes 16 bits only: not for a pass in float32, and for one in bfloat16 of a float32 model; a chosen kernel stays."""
    half, whole = SMALL.replace(dtype="bfloat16", attention="cudnn"), SMALL.replace(attention="xla")
    gpu = _Mesh("gpu")
    assert _in_dtype(half, "float32", gpu).attention == "xla" and _in_dtype(whole, "bfloat16", gpu).attention == "cudnn"
    assert _in_dtype(half.replace(attention="xla"), "float32", gpu).attention == "xla"
    assert _in_dtype(whole.replace(attention="blocks"), "bfloat16", _Mesh("cpu")).attention == "blocks"
