"""Quantiles of Student's t distribution, for the envelope's prediction bound: SciPy is no dependency."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

_POINTS = 4001


def probability(t: float, freedom: int) -> float:
    """P(T <= t). With t = sqrt(freedom) * tan(a) the density is cos(a) ** (freedom - 1) times a constant."""
    angles = np.linspace(0.0, math.atan(abs(t) / math.sqrt(freedom)), _POINTS)
    heights = np.cos(angles) ** (freedom - 1)
    # Simpson's rule.
    width = angles[1] - angles[0]
    area = width / 3 * (heights[0] + heights[-1] + 4 * heights[1:-1:2].sum() + 2 * heights[2:-1:2].sum())
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return float(0.5 + math.copysign(constant * area, t))


@lru_cache(maxsize=64)
def quantile(p: float, freedom: int) -> float:
    """t with P(T <= t) = p, for p of at least 1/2."""
    low, high = 0.0, 1.0
    while probability(high, freedom) < p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle, freedom) < p else (low, middle)
    return (low + high) / 2
