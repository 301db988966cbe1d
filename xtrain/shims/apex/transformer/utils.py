"""`apex.transformer.utils`: whole division."""

from __future__ import annotations

from xtrain.shims.apex import refused


def ensure_divisibility(numerator: int, denominator: int) -> None:
    """Raises AssertionError when the division leaves a rest."""
    assert numerator % denominator == 0, f"{numerator} is not divisible by {denominator}"


def divide(numerator: int, denominator: int) -> int:
    """The quotient, which must be whole."""
    ensure_divisibility(numerator, denominator)
    return numerator // denominator


__getattr__ = refused.attributes(__name__)
