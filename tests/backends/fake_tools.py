"""Emulated arithmetic computed again by the definition, number by number, with numpy and fractions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

STORED = {"tf32": 10, "hf32": 11}


def rounded(x: float, stored: int, rounding: str) -> float:
    """A float32 number on a grid of `stored` mantissa bits, in exact fractions."""
    if x == 0 or not math.isfinite(x):
        return x
    exponent = max(math.frexp(abs(x))[1] - 1, -126)
    unit = Fraction(2) ** (exponent - stored)
    count = abs(Fraction(x)) / unit
    below = count.numerator // count.denominator
    rest = count - below
    up = {
        "toward-zero": False,
        "nearest-away": rest >= Fraction(1, 2),
        "nearest-even": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1),
    }[rounding]
    value = (below + up) * unit
    if value > Fraction(float(np.finfo(np.float32).max)):
        return math.copysign(math.inf, x)
    return math.copysign(float(value), x)


def worker_sum(values: Sequence[float], each: int) -> np.float32:
    """The sum of float32 numbers by workers that add `each` numbers, then by halves."""
    workers = -(-len(values) // each)
    totals = [np.float32(value) for value in values[:workers]]
    for place, value in enumerate(values[workers:]):
        totals[place % workers] = np.float32(totals[place % workers] + np.float32(value))
    while len(totals) > 1:
        half = (len(totals) + 1) // 2
        for place in range(len(totals) - half):
            totals[place] = np.float32(totals[place] + totals[half + place])
        totals = totals[:half]
    return totals[0]


def product_in_order(a: np.ndarray, b: np.ndarray, accumulator: type) -> np.ndarray:
    """The product of float32 matrices, one product after the other added to an accumulator of the given type."""
    wide = np.float64 if accumulator is np.float64 else np.float32
    result = np.zeros((a.shape[0], b.shape[1]), dtype=accumulator)
    for k in range(a.shape[1]):
        part = np.float32(a[:, k : k + 1] * b[k : k + 1, :])
        result = (
            part.astype(accumulator)
            if k == 0
            else (result.astype(wide) + part.astype(wide)).astype(accumulator)
        )
    return result.astype(np.float32)
