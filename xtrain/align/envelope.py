"""The band in which correct runs stay: measured from K runs, stored beside the reference. Imports no torch.

The statistical model is in docs/alignment.md. In short: relative deviations of correct runs from their mean have a
scale that changes smoothly with the step; it is estimated at every step, smoothed, and never shrinks. How many
scales a further correct run strays at most is predicted from how far each of the K runs strays from the band of
the others.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xtrain.align.record import Floats, Record, Steps
from xtrain.align.student import quantile
from xtrain.errors import RecordError
from xtrain.files import atomic_path

VERSION = 1
FALSE_ALARMS = 0.01
FLOOR = 1e-6
"""Relative difference that is always allowed: about eight units in the last place of a float32."""
HALF_WINDOW = 10
FACTOR_OF_TWO = 10.0
"""Widening for two runs, of which nothing can be left out: a guess, for which no false-alarm rate is claimed."""
TINY = 1e-12


def chi_square_median(freedom: int) -> float:
    """Median of the chi-square distribution over its mean: exact for 1 and 2, Wilson and Hilferty's beyond."""
    if freedom == 1:
        return 0.454936423119573
    if freedom == 2:
        return math.log(2.0)
    return float((1 - 2 / (9 * freedom)) ** 3)


def smooth_scale(variance: Floats, freedom: int, half_window: int = HALF_WINDOW, floor: float = FLOOR) -> Floats:
    """The scale of deviations at every step, from the variance over runs at every step (axis 0).

    A running median of the variances, corrected for the median of a chi-square being below its mean; never
    smaller than at an earlier step, than what the step itself shows, or than `floor`.
    """
    n = len(variance)
    medians = np.empty_like(variance)
    h = min(half_window, (n - 1) // 2)
    if n > 2 * h:
        for start in range(0, n - 2 * h, 4096):  # in blocks, for memory
            stop = min(start + 4096, n - 2 * h)
            windows = np.lib.stride_tricks.sliding_window_view(variance[start : stop + 2 * h], 2 * h + 1, axis=0)
            medians[start + h : stop + h] = np.median(windows, axis=-1)
    for row in range(h):  # at the ends the window shrinks
        medians[row] = np.median(variance[: 2 * row + 1], axis=0)
        medians[n - 1 - row] = np.median(variance[n - 1 - 2 * row :], axis=0)
    smoothed = np.sqrt(medians / chi_square_median(freedom))
    growing = np.maximum.accumulate(smoothed, axis=0)
    return np.asarray(np.maximum(np.maximum(growing, np.sqrt(variance)), floor))


@dataclass(frozen=True)
class Band:
    """Centre and scale of K curves, over steps (axis 0)."""

    centre: Floats
    scale: Floats

    @classmethod
    def of(cls, curves: Floats, floor: float = FLOOR, half_window: int = HALF_WINDOW, base: Any = None) -> Band:
        """From curves of shape (K, steps, ...).

        Args:
            base: what deviations are relative to; None: the size of the centre.
        """
        centre = curves.mean(axis=0)
        size = np.maximum(np.abs(centre) if base is None else base, TINY)
        variance = (((curves - centre) / size) ** 2).sum(axis=0) / (len(curves) - 1)
        # A further run differs from the mean of K by its own deviation and that of the mean.
        scale = smooth_scale(variance, len(curves) - 1, half_window, floor) * math.sqrt(1 + 1 / len(curves))
        return cls(centre, scale)

    def excess(self, curve: Floats, base: Any = None) -> Floats:
        """How many scales a curve is away, at every step."""
        size = np.maximum(np.abs(self.centre) if base is None else base, TINY)
        return np.asarray(np.abs(curve - self.centre) / size / self.scale)


def strays(curves: Floats, **options: Any) -> Floats:
    """How far each curve strays at most from the band of the others, in scales. At least three curves."""
    found = []
    for left_out in range(len(curves)):
        band = Band.of(np.delete(curves, left_out, axis=0), **options)
        found.append(float(band.excess(curves[left_out], options.get("base")).max()))
    return np.array(found)


def widening(found: Floats, false_alarms: float) -> float:
    """How many scales a further run strays at most, but for `false_alarms` of the runs.

    The upper prediction bound for one more draw, when the logarithms of the strays are normal.
    """
    logs = np.log(np.maximum(found, 1e-3))
    k = len(logs)
    bound = logs.mean() + quantile(1 - false_alarms, k - 1) * logs.std(ddof=1) * math.sqrt(1 + 1 / k)
    # Never inside of what correct runs were seen to do.
    return float(max(math.exp(min(bound, 50.0)), found.max(), 1.0))


@dataclass
class Envelope:
    """A measured band, with the runs it was measured from.

    Attributes:
        step, curves: steps that all runs have; their losses, shape (K, steps).
        false_alarms: share of correct runs that it may call departed; None where none can be claimed (two runs).
        factor: scales that are allowed.
        centre, limit: mean loss, and largest relative deviation from it, at every step.
        header: of the first run.
        sources: where the runs were read.
        size: of the perturbation that the runs started with, if they did; "one ulp" or a relative size.
    """

    step: Steps
    curves: Floats
    false_alarms: float | None
    factor: float
    header: dict[str, Any] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    size: str | None = None

    def __post_init__(self) -> None:
        band = Band.of(self.curves)
        self.centre: Floats = band.centre
        self.limit: Floats = band.scale * self.factor

    @classmethod
    def measure(
        cls,
        step: Steps,
        curves: Floats,
        false_alarms: float = FALSE_ALARMS,
        **more: Any,
    ) -> Envelope:
        """The envelope of K >= 2 curves over the same steps."""
        if len(curves) < 3:
            return cls(step, curves, None, FACTOR_OF_TWO, **more)
        return cls(step, curves, false_alarms, widening(strays(curves), false_alarms), **more)

    def outside(self, curve: Floats) -> npt.NDArray[np.bool_]:
        """At which steps a curve over the same steps is outside."""
        deviation = np.abs(curve - self.centre) / np.maximum(np.abs(self.centre), TINY)
        return np.asarray(~(deviation <= self.limit))

    def leave_one_out(self) -> int | None:
        """How many of the K runs the envelope of the others calls departed; None with fewer than four runs."""
        if len(self.curves) < 4 or self.false_alarms is None:
            return None
        departed = 0
        for left_out in range(len(self.curves)):
            others = np.delete(self.curves, left_out, axis=0)
            envelope = Envelope.measure(self.step, others, self.false_alarms)
            departed += bool(envelope.outside(self.curves[left_out]).any())
        return departed

    def sentence(self) -> str:
        """What it is, for a person."""
        last = self.limit[-1]
        rate = (
            "no false-alarm rate can be claimed for two runs"
            if self.false_alarms is None
            else f"false-alarm rate {self.false_alarms:.1%}"
        )
        started = f", started {self.size} apart" if self.size else ""
        return (
            f"envelope of {len(self.curves)} runs{started}, steps {self.step[0]} to {self.step[-1]}: allows "
            f"{self.limit[0]:.1e} at the first step and {last:.1e} at the last; widened {self.factor:.1f} times, {rate}"
        )

    def save(self, path: Path) -> None:
        """Write it to a .npz file, completely or not at all."""
        about = {
            "type": "xtrain envelope",
            "version": VERSION,
            "false_alarms": self.false_alarms,
            "factor": self.factor,
            "header": self.header,
            "sources": self.sources,
            "size": self.size,
        }
        text = np.frombuffer(json.dumps(about, default=str).encode(), np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, about=text, step=self.step, curves=self.curves)


def read_envelope(path: Path) -> Envelope:
    """Read an envelope; never executes code from the file.

    Raises:
        RecordError: it is missing, damaged, or of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            step, curves = file["step"].astype(np.int64), file["curves"].astype(np.float64)
        if about["type"] != "xtrain envelope" or about["version"] != VERSION:
            raise RecordError(f"{path} is an envelope of version {about['version']}, this xtrain reads {VERSION}")
        if curves.ndim != 2 or len(curves) < 2 or curves.shape[1] != len(step) or not len(step):
            raise ValueError(f"{curves.shape} losses for {len(step)} steps")
        return Envelope(
            step,
            curves,
            about["false_alarms"],
            float(about["factor"]),
            about["header"],
            about["sources"],
            about["size"],
        )
    except FileNotFoundError:
        raise RecordError(f"{path} does not exist: measure it with `xtrain align envelope`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, EOFError) as error:
        raise RecordError(f"{path} is not an envelope: {error}") from None


def measure_records(
    records: Sequence[Record], false_alarms: float = FALSE_ALARMS, size: str | None = None
) -> Envelope:
    """The envelope of recorded runs over the steps that all of them have.

    Raises:
        RecordError: fewer than two runs, no step in common, a loss that is not finite, or all runs the same.
    """
    if len(records) < 2:
        raise RecordError("an envelope needs two runs at least; from three on a false-alarm rate can be claimed")
    steps = records[0].step
    for record in records[1:]:
        steps = np.intersect1d(steps, record.step, assume_unique=True)
    if not len(steps):
        raise RecordError(f"the runs have no step in common: {', '.join(str(record.path) for record in records)}")
    curves = np.stack([record.loss[np.searchsorted(record.step, steps)] for record in records])
    for record, curve in zip(records, curves, strict=True):
        if not np.isfinite(curve).all():
            step = steps[int(np.argmin(np.isfinite(curve)))]
            raise RecordError(f"{record.path} has no finite loss at step {step}: it is no correct run to measure by")
    if len(np.unique(curves, axis=0)) < len(curves):
        raise RecordError(
            "two of the runs are the same to the last bit, so their spread says nothing: start each from weights "
            "perturbed by another seed (`xtrain align envelope --runs K -- COMMAND` does)"
        )
    return Envelope.measure(
        steps,
        curves,
        false_alarms,
        header=records[0].header,
        sources=[str(record.path) for record in records],
        size=size,
    )
