"""One device or eight: the same decisions, losses and updates."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from qtjax.config import MeshSection, to_json
from qtjax.errors import QtjaxError
from qtjax.parallel import make_mesh
from qtjax.training.restore import load_run

# Runs one step from the config's own start and prints what it decided and measured.
_SCRIPT = """
import json, sys
import jax, numpy as np
from rich.console import Console
from qtjax.config import from_json, override
from qtjax.training.run import open_session
from qtjax.training.run_folder import RunFolder
from qtjax.tree import flatten
base = from_json(open(sys.argv[1]).read())
out = {}
for name, mesh in json.loads(sys.argv[2]).items():
    config = override(base, {f"mesh.{k}": v for k, v in mesh.items()} | {"run.folder": base.run.folder + name})
    with RunFolder.open(config) as folder:
        session = open_session(config, folder, Console(quiet=True))
        before = {p: np.asarray(x) for p, x in flatten(session.loop.state.trainable).items()}
        metrics, records = session.loop.step(0, session.total_steps)
        after = {p: np.asarray(x) for p, x in flatten(session.loop.state.trainable).items()}
        real = records["row"] >= 0
        out[name] = {
            "devices": len(jax.devices()), "loss": metrics["loss"], "grad_norm": metrics["grad_norm"],
            "row": records["row"][real].tolist(), "keep": records["keep"][real].tolist(),
            "kept_tokens": records["kept_tokens"][real].tolist(), "quadrant": records["quadrant"][real].tolist(),
            "perplexity": records["perplexity"][real].tolist(),
            "update": {p: (after[p] - before[p]).tolist() for p in after},
        }
        session.close()
print("RESULT" + json.dumps(out))
"""

# Runs the config twice, once without interruption and once with a crash in between; prints what compiled after warm-up
# and the paths of parameters that differ.
_CRASH_SCRIPT = """
import json, sys
import jax, numpy as np
from rich.console import Console
from qtjax.config import from_json, override
from qtjax.training import story
from qtjax.training.loop import Loop
from qtjax.training.restore import load_run
from qtjax.tree import flatten
base = from_json(open(sys.argv[1]).read())
mesh, quiet = json.loads(sys.argv[2]), Console(quiet=True)
whole, broken = (
    override(base, {f"mesh.{k}": v for k, v in mesh.items()} | {"run.folder": base.run.folder + name}) for name in ("whole", "broken")
)
compiled, watching, true_step = [], [False], Loop.step
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if watching[0] and "backend_compile" in name else None
)
def step(self, number, last):
    if crash and number == 4:
        raise KeyError("crash")
    watching[0] = number > 0
    try:
        return true_step(self, number, last)
    finally:
        watching[0] = False
Loop.step, crash = step, False
story.run(whole, quiet, quiet=True)
crash = True
try:
    story.run(broken, quiet, quiet=True)
except KeyError:
    crash = False
story.run(broken, quiet, quiet=True)
one, other = (flatten(load_run(config.run.folder)[2]) for config in (whole, broken))
differ = [path for path in one if not np.array_equal(one[path], other[path])]
print("RESULT" + json.dumps({"devices": len(jax.devices()), "compiled": compiled, "crashed": not crash, "differ": differ}))
"""


def _run(tmp_path, config, meshes, devices, script=_SCRIPT):
    file = tmp_path / f"config{devices}.json"
    file.write_text(to_json(config))
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}

    done = subprocess.run(
        [sys.executable, "-c", script, str(file), json.dumps(meshes)],
        env=os.environ | flags, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "lora"])
def test_one_step_is_the_same_on_one_and_on_eight_devices(tiny_config, tmp_path, method):
    """Same decisions, losses within 1e-5, updates within 1e-4, for data, fsdp and tensor meshes of eight devices."""
    config = tiny_config(**{
        "data.eval_fraction": 0.0, "train.rows": 8, "train.shapes": 1, "overlay.method": method, "overlay.r": 4,
        "train.warmup_fraction": 0.0, "train.eps": 1e-3, "run.folder": str(tmp_path / "run"),
    })  # fmt: skip
    one = _run(tmp_path, config, {"one": {"data": 1}}, 1)["one"]
    meshes = {"data": {"data": 8}, "fsdp": {"data": 1, "fsdp": 8}, "mixed": {"data": 2, "fsdp": 2, "tensor": 2}}
    for name, found in _run(tmp_path, config, meshes, 8).items():
        assert found["devices"] == 8
        assert found["row"] == one["row"]
        np.testing.assert_allclose(found["perplexity"], one["perplexity"], rtol=1e-5, err_msg=name)
        # scores apart by less than 1e-5 may change places; these data have no such pair
        assert found["keep"] == one["keep"] and found["quadrant"] == one["quadrant"], name
        assert found["kept_tokens"] == one["kept_tokens"], name
        assert found["loss"] == pytest.approx(one["loss"], rel=1e-5), name
        assert found["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), name
        for path, update in one["update"].items():
            scale = np.abs(update).max()
            np.testing.assert_allclose(found["update"][path], update, atol=1e-4 * scale, err_msg=f"{name} {path}")


@pytest.mark.slow
def test_lagged_scores_on_eight_devices_survive_a_crash_bitwise(tiny_config, tmp_path):
    """score_lag on data x fsdp, batch of 20 padded to 24: nothing compiles after warm-up, the restarted run ends the same."""
    config = tiny_config(**{
        "data.eval_fraction": 0.0, "train.rows": 8, "train.shapes": 1, "prune.score_lag": 1, "prune.batch_size": 20,
        "run.folder": str(tmp_path / "run"),
    })  # fmt: skip
    mesh = {"data": 4, "fsdp": 2}
    found = _run(tmp_path, config, mesh, 8, _CRASH_SCRIPT)
    assert found == {"devices": 8, "compiled": [], "crashed": True, "differ": []}
    assert load_run(f"{config.run.folder}broken")[0].mesh.data == 4  # read back on the one device here


def test_a_mesh_that_does_not_fit_the_devices_says_what_does():
    """The product of the axes must be the number of devices; the error names both and the remedy."""
    with pytest.raises(QtjaxError, match=r"mesh.data x mesh.fsdp x mesh.tensor = -1 x 3 x 1.*number of devices, 1"):
        make_mesh(MeshSection(data=-1, fsdp=3))
    assert dict(make_mesh(MeshSection()).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
