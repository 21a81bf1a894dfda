"""Evaluations on a mesh of eight devices equal those on one device, also where rows and prompts do not divide by it."""

import json

import numpy as np
import pytest


@pytest.mark.slow
def test_a_mesh_changes_nothing(run_python):
    """Loss, choice likelihoods and greedy answers with data x fsdp x tensor = 2 x 2 x 2."""
    out = json.loads(run_python("tests.evals.eight_devices", devices=8).splitlines()[-1])
    one, mesh = out["one"], out["mesh"]
    assert mesh["loss"] == pytest.approx(one["loss"], rel=1e-5) and mesh["tokens"] == one["tokens"]
    np.testing.assert_allclose(mesh["nll"], one["nll"], rtol=1e-5)
    assert mesh["answers"] == one["answers"]
