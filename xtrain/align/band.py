"""How far correct runs stray: the statistical model of the envelope (docs/alignment.md). Imports no torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xtrain.align.record import Floats
from xtrain.align.student import quantile

FLOOR = 1e-6
"""Relative difference that is always allowed: about eight units in the last place of a float32."""
NORM_FLOOR = 1e-5
"""The same for gradient norms, whose squares some engines and chips add up in float32."""
MODULE_FLOOR = 1e-5
"""The same for statistics of modules: sums of float32 in another order."""
RESOLUTION = 0.02
"""No scale is smaller than this share of the floor: for losses the root mean square of rounding to float32."""
HALF_WINDOW = 10
"""Steps before and after that the scale at a step is smoothed over."""
SMALLEST_STRAY = 0.5
"""Runs that stray less, or never beyond the floor, count as straying so much: how little says nothing of others."""
WINDOW, MAJORITY = 5, 3
"""What lasts is beyond a limit at so many of so many steps in a row."""
TINY = 1e-12
COARSEST, FINEST = 2.0**-7, 2.0**-23
"""Relative distance of neighbours on the grids of bfloat16 and of float32."""
UNIFORM = 1 / math.sqrt(12)
"""Standard deviation of what rounding to a grid does, in steps of the grid."""
AVERAGED = 1 / 16
"""Share of a step of the grid by which an average may differ in any case: equal elements all round the same way."""


def grid_of(values: Floats) -> Floats:
    """The grid that all values lie on: the relative distance of neighbours, 2^-7 for bfloat16 and 2^-10 for float16.

    Seen from the values, so that it is known of every record: of those that fit no 16-bit grid it is 2^-23.

    Args:
        values: shape (runs, steps, ...).

    Returns:
        shape (...), between COARSEST and FINEST.
    """
    bits = 53  # of a float64
    significand, _ = np.frexp(np.where(np.isfinite(values), values, 0.0).astype(np.float64))
    whole = (np.abs(significand) * 2.0**bits).astype(np.int64)  # exact
    lowest = np.where(whole == 0, 2**bits, whole & -whole)  # the last bit that is set
    lowest = lowest.reshape(-1, *values.shape[2:]).min(axis=0)
    return np.asarray(np.clip(lowest / 2.0 ** (bits - 1), FINEST, COARSEST))


def allow_grid(grid: Any, floor: float) -> tuple[Any, Any]:
    """(floor, smallest scale) of numbers that lie on a grid: one step of it is always allowed, and says nothing."""
    return np.maximum(floor, grid), np.maximum(RESOLUTION * floor, UNIFORM * grid)


def allow_average(grid: Any, floor: float) -> tuple[Any, Any]:
    """The same for averages over numbers that do, in which rounding cancels but for a small share of a step."""
    least = np.maximum(floor, AVERAGED * grid)
    return least, RESOLUTION * least


def floors(size: float) -> tuple[float, float, float]:
    """What losses, gradient norms and statistics may differ by in any case, in a band of runs perturbed by `size`.

    Arithmetic that rounds by so much may do it in one direction, as truncation does, which perturbations up and down
    do not show: products shrink, norms with them, losses hardly.
    """
    return max(FLOOR, size / 2), max(NORM_FLOOR, 4 * size), max(MODULE_FLOOR, 4 * size)


def chi_square_median(freedom: int) -> float:
    """Median of the chi-square distribution over its mean: exact for 1 and 2, Wilson and Hilferty's beyond."""
    if freedom == 1:
        return 0.454936423119573
    if freedom == 2:
        return math.log(2.0)
    return float((1 - 2 / (9 * freedom)) ** 3)


def smooth_scale(
    variance: Floats, freedom: int, half_window: int = HALF_WINDOW, smallest: Any = RESOLUTION * FLOOR
) -> Floats:
    """The scale of deviations at every step, from the variance over runs at every step (axis 0).

    A running median of the variances, corrected for the median of a chi-square being below its mean; never
    smaller than at an earlier step, than what the step itself shows, or than `smallest`. A step whose variance is NaN
    is passed over, and its scale is infinite.
    """
    n = len(variance)
    unknown = np.isnan(variance)
    median = _nanmedian if unknown.any() else np.median
    medians = np.empty_like(variance)
    h = min(half_window, (n - 1) // 2)
    if n > 2 * h:
        for start in range(0, n - 2 * h, 4096):  # in blocks, for memory
            stop = min(start + 4096, n - 2 * h)
            windows = np.lib.stride_tricks.sliding_window_view(
                variance[start : stop + 2 * h], 2 * h + 1, axis=0
            )
            medians[start + h : stop + h] = median(windows, axis=-1)
    for row in range(h):  # at the ends the window shrinks
        medians[row] = median(variance[: 2 * row + 1], axis=0)
        medians[n - 1 - row] = median(variance[n - 1 - 2 * row :], axis=0)
    smoothed = np.sqrt(medians / chi_square_median(freedom))
    growing = np.fmax.accumulate(smoothed, axis=0)
    found = np.maximum(np.fmax(growing, np.sqrt(variance)), smallest)
    return np.asarray(np.where(unknown, np.inf, found))


def _nanmedian(values: Floats, axis: int) -> Floats:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")  # of a module that never ran
        return np.asarray(np.nanmedian(values, axis=axis))


@dataclass(frozen=True)
class Band:
    """Centre and scale of K curves, over steps (axis 0)."""

    centre: Floats
    scale: Floats
    floor: Any

    @classmethod
    def of(
        cls,
        curves: Floats,
        floor: Any = FLOOR,
        half_window: int = HALF_WINDOW,
        base: Any = None,
        smallest: Any = None,
    ) -> Band:
        """From curves of shape (K, steps, ...).

        Args:
            floor: relative deviation that is always allowed; a number, or one for each curve.
            base: what deviations are relative to; None: the size of the centre.
            smallest: scale, in the same units; None: a fiftieth of the floor.
        """
        curves = _known(curves)
        centre = curves.mean(axis=0)
        size = np.maximum(np.abs(centre) if base is None else base, TINY)
        variance = (((curves - centre) / size) ** 2).sum(axis=0) / (len(curves) - 1)
        # A further run differs from the mean of K by its own deviation and that of the mean.
        more = math.sqrt(1 + 1 / len(curves))
        least = RESOLUTION * floor if smallest is None else smallest
        scale = smooth_scale(variance, len(curves) - 1, half_window, least) * more
        return cls(centre, scale, floor)

    def excess(self, curve: Floats, base: Any = None) -> Floats:
        """How many scales a curve is away, at every step; 0 where the floor allows it anyway."""
        size = np.maximum(np.abs(self.centre) if base is None else base, TINY)
        deviation = np.abs(curve - self.centre) / size
        return np.asarray(np.where(deviation <= self.floor, 0.0, deviation / self.scale))  # NaN: not known

    def limit(self, factor: float) -> Floats:
        """The largest relative deviation that is allowed at every step."""
        return np.asarray(np.maximum(self.scale * factor, self.floor))


def persists(beyond: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Where it is beyond a limit, and not alone: among WINDOW steps (axis 0) in a row, MAJORITY are."""
    n = len(beyond)
    found = np.zeros_like(beyond)
    if n < WINDOW:
        return found
    counts = sum(beyond[shift : n - WINDOW + 1 + shift].astype(np.int8) for shift in range(WINDOW))
    many = np.asarray(counts) >= MAJORITY
    for shift in range(WINDOW):
        found[shift : n - WINDOW + 1 + shift] |= many
    return np.asarray(found & beyond)


def outside(deviation: Any, limit: Any, once: Any) -> npt.NDArray[np.bool_]:
    """Where a deviation is more than what is allowed: by `once` for a single step, by `limit` for what lasts."""
    return np.asarray(~(deviation <= once) | persists(np.asarray(~(deviation <= limit))))


def _largest_lasting(excess: Floats) -> float:
    """The largest median over WINDOW steps in a row; 0 when there are fewer."""
    largest = 0.0
    for start in range(0, len(excess) - WINDOW + 1, 4096):  # in blocks, for memory
        rows = excess[start : start + 4096 + WINDOW - 1]
        rows = np.nan_to_num(rows, nan=0.0)
        medians = np.median(np.lib.stride_tricks.sliding_window_view(rows, WINDOW, axis=0), axis=-1)
        largest = max(largest, float(np.nanmax(medians, initial=0.0)))
    return largest


def _known(curves: Floats) -> Floats:
    """NaN where one of the curves is not finite: gradients overflow in 16 bits, and values say nothing there."""
    return np.asarray(np.where(np.isfinite(curves).all(axis=0), curves, np.nan))


def strays(curves: Floats, **options: Any) -> Floats:
    """How far each curve strays from the band of the others, in scales: shape (2, K). At least three curves.

    The first row is at any step, the second what lasts.
    """
    found, curves = [], _known(curves)
    for left_out in range(len(curves)):
        band = Band.of(np.delete(curves, left_out, axis=0), **options)
        excess = band.excess(curves[left_out], options.get("base"))
        found.append((float(np.nanmax(excess, initial=0.0)), _largest_lasting(excess)))
    return np.array(found).T


@dataclass(frozen=True)
class Factors:
    """How many scales are allowed: what lasts, and what happens once."""

    lasting: float
    once: float

    @classmethod
    def of(cls, found: Floats, false_alarms: float, others: Sequence[Floats] = ()) -> Factors:
        """From what `strays` returned; half of the false alarms for each.

        Args:
            others: the same of all statistics of the same runs.
        """
        once, lasting = (
            widening(row, false_alarms / 2, [other[index] for other in others])
            for index, row in enumerate(found)
        )
        return cls(lasting, max(once, lasting))


def _logs(found: Floats) -> Floats:
    return np.asarray(np.log(np.maximum(found, SMALLEST_STRAY)))


def widening(found: Floats, false_alarms: float, others: Sequence[Floats] = ()) -> float:
    """How many scales a further run strays at most, but for `false_alarms` of the runs.

    The upper prediction bound for one more draw, when the logarithms of the strays are normal. Few runs say little of
    their variance. What other statistics of the same runs have, in the median, counts as much as a statistic's own
    (a moderated t-statistic: Smyth, Statistical Applications in Genetics and Molecular Biology 3, 2004).
    """
    logs = _logs(found)
    k = len(logs)
    variance, freedom = logs.var(ddof=1), k - 1
    if len(others) > 1:
        typical = np.median([_logs(other).var(ddof=1) for other in others])
        variance, freedom = (variance + typical) / 2, 2 * freedom
    bound = logs.mean() + quantile(1 - false_alarms, freedom) * math.sqrt(variance * (1 + 1 / k))
    # Never inside of what correct runs were seen to do.
    return float(max(math.exp(min(bound, 50.0)), found.max(), 1.0))
