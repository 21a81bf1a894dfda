"""Evaluations on a mesh of eight devices equal those on one device, also where rows and prompts do not divide by it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.slow
def test_a_mesh_changes_nothing():
    """Loss, choice likelihoods and greedy answers with data x fsdp x tensor = 2 x 2 x 2."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    script = Path(__file__).with_name("eight_devices.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads(done.stdout.splitlines()[-1])
    one, mesh = out["one"], out["mesh"]
    assert mesh["loss"] == pytest.approx(one["loss"], rel=1e-5) and mesh["tokens"] == one["tokens"]
    np.testing.assert_allclose(mesh["nll"], one["nll"], rtol=1e-5)
    assert mesh["answers"] == one["answers"]
