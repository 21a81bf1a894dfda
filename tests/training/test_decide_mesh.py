"""Global selection over a mesh: some numbers a sample travel, once before the choice and once after it; tokens stay where they are."""

import json

import pytest


@pytest.mark.slow
def test_selection_moves_a_few_numbers_a_sample_and_decides_as_one_device_does(run_python):
    """`decide` compiled for 4 x 2 devices, every kind of pruner: every choice is that of one device, scores within 1e-6.

    Two all-gathers and nothing else: what stage 1 knows (perplexity, entropy, count, valid, index and InfoBatch's plan, 4
    bytes each) before it, and each sample's number of kept tokens after stage 2: at most 28 bytes a sample, whatever its
    length. token-cleaning has one budget for all tokens of the batch, so its [N, T] ratings travel, 8 bytes a token and no more.
    """
    found = json.loads(run_python("tests.training.decide_on_eight", devices=8).split("RESULT")[1])
    samples, slots = found["samples"], found["slots"]
    assert len(found["pruners"]) == 6
    for name, pruner in found["pruners"].items():
        assert pruner["differ"] == [], name
        moved = {each["kind"]: each for each in pruner["decide"]}
        if name == "token-cleaning":
            assert moved["all-gather"]["bytes"] <= samples * (28 + 8 * slots)
            continue
        assert list(moved) == ["all-gather"], (name, moved)
        assert moved["all-gather"]["count"] == 2 and moved["all-gather"]["bytes"] <= 28 * samples, (name, moved)
        if "choose" in pruner:
            (gather,) = pruner["choose"]
            assert gather["kind"] == "all-gather" and gather["count"] == 1 and gather["bytes"] <= 24 * samples, (name, gather)
