"""torch's CPU generator in numpy: some PEFT adapters keep random arrays only as a seed of it.

torch.Generator().manual_seed(s) is MT19937 seeded the legacy way with the low 32 bits of s, as numpy's RandomState is,
so both give the same 32-bit draws; what torch makes of them is written out here. Equal to torch bit for bit
(tests/overlays/test_torch_random.py).
"""

import functools

import numpy as np

# From this size on torch.randperm takes 64-bit draws and another algorithm.
_LARGE = (2**32 - 1) // 20


def generator(seed: int) -> np.random.RandomState:
    """The state of torch.Generator().manual_seed(seed)."""
    return np.random.RandomState(seed & 0xFFFFFFFF)


def _draws(state: np.random.RandomState, shape: tuple[int, ...] | int) -> np.ndarray:
    return state.randint(0, 1 << 32, shape, dtype=np.uint32)


@functools.lru_cache(maxsize=16)
def permutation(size: int, count: int, seed: int) -> np.ndarray:
    """int64 [count]: the first values of torch.randperm(size, generator=...manual_seed(seed)).

    Only the values asked for are kept: a Fisher-Yates shuffle fixes place i at step i, and the inside-out variant of
    large sizes, which runs over all of them, touches the first places rarely.
    """
    state = generator(seed)
    if size >= _LARGE:
        return _inside_out(state, size, count)
    draws, moved, out = _draws(state, count).astype(np.int64), {}, np.empty(count, np.int64)
    for i in range(count):
        j = i + int(draws[i]) % (size - i)
        out[i] = moved.get(j, j)
        moved[j] = moved.pop(i, i)
    return out


def _inside_out(state: np.random.RandomState, size: int, count: int, block: int = 1 << 22) -> np.ndarray:
    """Step i puts i into a place z <= i drawn evenly, and what stood there into place i."""
    out = np.empty(count, np.int64)
    for start in range(0, size, block):
        steps = np.arange(start, min(start + block, size), dtype=np.uint64)
        high, low = _draws(state, (len(steps), 2)).astype(np.uint64).T
        places = ((high << np.uint64(32)) | low) % (steps + np.uint64(1))
        for n in np.flatnonzero(places < count):
            i, z = int(steps[n]), int(places[n])
            if i < count:
                out[i] = out[z]
            out[z] = i
    return out


def uniform(state: np.random.RandomState, shape: tuple[int, ...], bound: float) -> np.ndarray:
    """float32: torch.empty(shape).uniform_(-bound, bound), from the low 24 bits of each draw, computed in float64."""
    low, high = np.float32(-bound), np.float32(bound)
    fraction = (_draws(state, shape) & 0xFFFFFF).astype(np.float64) * 2.0**-24
    return (fraction * np.float64(high - low) + np.float64(low)).astype(np.float32)
