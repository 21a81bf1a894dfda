"""Random draws that are the same on every machine and with every NumPy: raw Philox words, reduced here.

NumPy fixes the raw stream of a bit generator for good, but lets `Generator.integers` and `shuffle` change between
releases; the rows of `smol-instruct` must not.
"""

from collections.abc import MutableSequence, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Draw:
    """A stream of draws, fixed by the key (seed, stream).

    Args:
      seed: 0 .. 2**64 - 1, the user's seed.
      stream: 0 .. 2**64 - 1, which independent stream of that seed.
    """

    def __init__(self, seed: int, stream: int = 0):
        self._bits = np.random.Philox(key=np.array([seed, stream], np.uint64))
        self._words: list[int] = []

    def below(self, n: int) -> int:
        """An integer in 0 .. n-1. The modulo's bias is under n / 2**64."""
        if not self._words:
            self._words = self._bits.random_raw(4096).tolist()  # one call for many: a single word costs 50x more
        return self._words.pop() % n

    def between(self, low: int, high: int) -> int:
        """An integer in low .. high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 draws."""
        return self.below(100) < percent

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffle(self, items: MutableSequence[T]) -> None:
        """In place, Fisher and Yates."""
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different positions of `items`, in random order."""
        chosen: list[int] = []
        while len(chosen) < count:
            i = self.below(len(items))
            if i not in chosen:
                chosen.append(i)
        return [items[i] for i in chosen]
