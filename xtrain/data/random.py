"""Random numbers that are a function of where they are used: seed and coordinates, never of order.

The bits come from Philox4x64 (Salmon et al., SC 2011) as numpy implements it; only its raw output is
used, because numpy promises that this stream never changes.
"""

from __future__ import annotations

import math
from collections.abc import MutableSequence
from typing import Any

import numpy as np


class CounterRandom:
    """A stream of random numbers for one (seed, coordinates); up to three coordinates."""

    def __init__(self, seed: int, *coordinates: int) -> None:
        # The first counter word is Philox's own running index.
        counter = np.zeros(4, dtype=np.uint64)
        counter[1 : 1 + len(coordinates)] = coordinates
        self._bits = np.random.Philox(counter=counter, key=np.array([seed, 0], dtype=np.uint64))

    def integer(self, bound: int) -> int:
        """Uniform in [0, bound)."""
        return (int(self._bits.random_raw()) * bound) >> 64

    def uniform(self) -> float:
        """Uniform in [0, 1), 53 bits."""
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def poisson(self, mean: float) -> int:
        """Poisson distributed, by multiplication of uniforms (Knuth); for small means."""
        limit, product, count = math.exp(-mean), self.uniform(), 0
        while product > limit:
            product *= self.uniform()
            count += 1
        return count

    def shuffle(self, items: MutableSequence[Any]) -> None:
        """Permute in place (Fisher and Yates)."""
        for last in range(len(items) - 1, 0, -1):
            other = self.integer(last + 1)
            items[last], items[other] = items[other], items[last]
