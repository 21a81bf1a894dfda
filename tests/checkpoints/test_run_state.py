"""Checkpoints of a run on a disk that really runs full, while Orbax writes in the background and before it begins."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtjax.checkpoints.run_state import RunState
from qtjax.errors import QtjaxError


def tree(key: int) -> dict:
    """1 MiB of noise, which compression cannot shrink, and small moments beside it."""
    noise = jax.random.normal(jax.random.key(key), (2, 128, 1024))
    return {"trainable": {"kernel": noise}, "optimizer": [jnp.int32(key), jnp.full(8, float(key))]}


def assert_restored(state: RunState, step: int, key: int) -> None:
    found = state.restore(tree(0))
    assert (found.step, found.skipped, found.meta) == (step, [], {"step": step})
    jax.tree.map(np.testing.assert_array_equal, found.state, tree(key))


def test_a_part_is_restored_alone(tmp_path):
    """part=True reads what the target names and nothing else; a leaf that no checkpoint has is an error, not a gap; whole
    restores stay strict, and all of it works in one process with saving."""
    state = RunState(tmp_path / "checkpoints")
    state.save(1, tree(1), {"step": 1})
    state.wait()
    trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree(0)["trainable"])
    found = state.restore({"trainable": trainable}, part=True)
    assert set(found.state) == {"trainable"} and found.meta == {"step": 1}
    np.testing.assert_array_equal(found.state["trainable"]["kernel"], tree(1)["trainable"]["kernel"])
    with pytest.raises(QtjaxError, match="can be read .it has no .*'bias'"):
        state.restore({"trainable": trainable | {"bias": jnp.zeros(3)}}, part=True)
    with pytest.raises(QtjaxError, match="none of the checkpoints"):
        state.restore({"trainable": trainable})
    state.save(2, tree(2), {"step": 2})
    state.wait()
    assert_restored(state, 2, 2)
    state.close()


def test_what_stays_on_the_host_is_read_back_there(tmp_path):
    """Numpy arrays beside the state are written and read back bit by bit as numpy arrays, also out of a checkpoint that has
    them as arrays of devices."""
    kept = {"nll": np.arange(6, dtype=np.float32) / 7, "plan": {"weight": np.ones(3, np.float32), "epoch": np.int32(4)}}
    state = RunState(tmp_path / "checkpoints")
    state.save(1, tree(1), {"step": 1}, kept)
    state.wait()
    read = [state.restore(tree(0), pending=lambda step: kept)]
    state.save(2, tree(2), {"step": 2}, jax.tree.map(jnp.asarray, kept))
    state.wait()
    read.append(state.restore(tree(0), pending=lambda step: kept))
    state.close()
    assert [found.step for found in read] == [1, 2]
    for found in read:
        assert jax.tree.structure(found.pending) == jax.tree.structure(kept)
        for a, b in zip(jax.tree.leaves(found.pending), jax.tree.leaves(kept)):
            assert isinstance(a, np.ndarray) and a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("free", [400_000, 0])
def test_a_disk_that_fills_up_costs_one_checkpoint_and_not_the_ones_before(small_disk, free):
    """ENOSPC while the background thread writes (400 kB free) or at the first folder (none): one line that names step and
    cause, the first checkpoint restores bitwise, no half one is listed, and with space again the same process saves."""
    disk = small_disk("4m")
    state = RunState(disk / "checkpoints")
    state.save(1, tree(1), {"step": 1})
    state.wait()
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - free))
    for _ in range(2):  # the second meets what the first left lying
        with pytest.raises(QtjaxError) as caught:
            state.save(2, tree(2), {"step": 2})
            if free:  # save has returned: what refuses is the background write
                assert state._manager._finalize_thread is not None
            state.wait()
        said = str(caught.value)
        assert "\n" not in said and len(said) < 600
        assert "checkpoint of step 2 could not be written" in said and "No space left on device" in said
        assert state.latest() == 1
        assert_restored(state, 1, 1)
    other = RunState(disk / "checkpoints")  # as a new process sees it
    assert_restored(other, 1, 1)
    other.close()
    filler.unlink()
    state.save(2, tree(2), {"step": 2})
    state.wait()
    assert_restored(state, 2, 2)
    state.close()
    assert sorted(path.name for path in (disk / "checkpoints").iterdir()) == ["1", "2"]
