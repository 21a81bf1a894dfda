"""torch's generator written in numpy, against torch."""

import math

import numpy as np
import pytest

from qtjax.overlays import torch_random
from qtjax.overlays.torch_random import generator, permutation, uniform

SEEDS = (0, 777, -1, -777, 2**32 + 5, 2**63 + 5)


@pytest.mark.parity
@pytest.mark.parametrize("seed", SEEDS)
def test_permutations_are_torch_s(seed):
    """The first values of randperm are torch's for any seed that torch takes, one value, all values or a few of many."""
    torch = pytest.importorskip("torch")
    for size, count in ((1, 1), (2, 2), (97, 97), (64 * 80, 50), (3_000_017, 1000)):
        theirs = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].numpy()
        np.testing.assert_array_equal(permutation(size, count, seed), theirs)


@pytest.mark.parity
@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_draws_are_torch_s_bit_for_bit(seed):
    """Two arrays drawn in turn from one generator equal torch's, bitwise."""
    torch = pytest.importorskip("torch")
    theirs, ours = torch.Generator().manual_seed(seed), generator(seed)
    for shape, bound in (((8, 80), math.sqrt(6 / 80)), ((80, 8), math.sqrt(6 / 8)), ((3, 20_001), 0.1)):
        expected = torch.empty(shape).uniform_(-bound, bound, generator=theirs).numpy()
        np.testing.assert_array_equal(uniform(ours, shape, bound).view(np.int32), expected.view(np.int32))


def test_large_permutations_follow_the_inside_out_shuffle(monkeypatch):
    """From 2^32 / 20 values on: the first places equal those of the whole shuffle, whatever the block.

    The whole of it was compared with torch once, at 214,748,364 (first 2000 values equal); torch takes 20 s for it.
    """
    size, count, seed = 5000, 300, 9
    draws = generator(seed).randint(0, 1 << 32, (size, 2), dtype=np.uint32).astype(object)
    whole = [0] * size
    for i, (high, low) in enumerate(draws):
        z = ((high << 32) | low) % (i + 1)
        whole[i] = whole[z]
        whole[z] = i
    monkeypatch.setattr(torch_random, "_LARGE", 1000)
    permutation.cache_clear()
    np.testing.assert_array_equal(permutation(size, count, seed), whole[:count])
    np.testing.assert_array_equal(torch_random._inside_out(generator(seed), size, count, block=77), whole[:count])
    permutation.cache_clear()
