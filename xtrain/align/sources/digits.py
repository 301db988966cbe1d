"""How numbers were rounded when they were written: read off their digits."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from xtrain.align.record import Floats

_DECIMAL = re.compile(r"^\s*[+-]?(\d+)(?:\.(\d*))?(?:[eE]([+-]?\d+))?\s*$")
ENOUGH_DIGITS = 15
"""So many significant digits, or more, are all that a float64 has."""
FEW_RATES = 3
"""So few different learning rates with one digit each are what somebody has set, not what was rounded."""

Digits = tuple[int, int]


def digits_of(texts: Iterable[str]) -> Digits | None:
    """(decimals, significant digits) that a column of numbers was written with: the most that any of them has.

    Tools write a fixed number of decimals or of significant digits, and leave trailing zeros out, or don't: the number
    with the most digits speaks for all. None where no number is known to be rounded: whole numbers alone, no numbers,
    or one with all the digits of a float64.
    """
    decimals, significant = None, 0
    for text in texts:
        match = _DECIMAL.match(text)
        if match is None:
            continue
        whole, fraction, exponent = match[1], match[2] or "", int(match[3] or 0)
        if (not fraction and match[3] is None) or abs(exponent) > 300:
            continue
        decimals = max(len(fraction) - exponent, len(fraction) - exponent if decimals is None else decimals)
        significant = max(significant, len((whole + fraction).lstrip("0")))
    if decimals is None or significant >= ENOUGH_DIGITS:
        return None
    return decimals, significant


def half_units(values: Floats, digits: Digits) -> Floats:
    """Half a unit of the last digit of each value: of the last decimal, or of the last significant digit if that is
    more."""
    decimals, significant = digits
    size = np.abs(np.where(np.isfinite(values), values, 0.0))
    place = np.floor(np.log10(np.where(size > 0, size, 1e-300)) + 1e-9) - significant + 1
    return np.asarray(0.5 * 10.0 ** np.maximum(place, -decimals))


def set_by_hand(values: Floats, digits: Digits) -> bool:
    """Whether these learning rates are what somebody has set: one alone, or few with one digit each."""
    different = len(np.unique(values[~np.isnan(values)]))
    return different <= 1 or (different <= FEW_RATES and digits[1] == 1)
