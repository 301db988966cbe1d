"""The band in which correct runs stay: measured from K runs, stored beside the reference. Imports no torch.

The statistical model is in docs/alignment.md. In short: relative deviations of correct runs from their mean have a
scale that changes smoothly with the step; it is estimated at every step, smoothed, and never shrinks. How many
scales a further correct run strays at most is predicted from how far each of the K runs strays from the band of
the others.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xtrain.align.band import FLOOR, NORM_FLOOR, TINY, Band, strays, widening
from xtrain.align.modules import ModuleBands, measure_bands
from xtrain.align.record import Floats, Record, Steps
from xtrain.errors import RecordError
from xtrain.files import atomic_path

VERSION = 2
FALSE_ALARMS = 0.01
FACTOR_OF_TWO = 10.0
"""Widening for two runs, of which nothing can be left out: a guess, for which no false-alarm rate is claimed."""
LOSS, NORM = "loss", "grad_norm"
FLOORS = {LOSS: FLOOR, NORM: NORM_FLOOR}
"""The curves that are judged, and what each of them may differ in any case."""


@dataclass
class Envelope:
    """A measured band, with the runs it was measured from.

    Attributes:
        step, curves: steps that all runs have; their losses, shape (K, steps).
        norms: their gradient norms, of the same shape; None when they have none that are all finite.
        false_alarms: share of correct runs that it may call departed; None where none can be claimed (two runs).
        factor: scales that are allowed.
        centre, limit: mean, and largest relative deviation from it that is allowed, at every step, by name of
            the curve.
        header: of the first run.
        sources: where the runs were read.
        size: of the perturbation that the runs started with, if they did; "one ulp" or a relative size.
        bands: of the module statistics, when all runs have them.
    """

    step: Steps
    curves: Floats
    false_alarms: float | None
    factor: float
    norms: Floats | None = None
    header: dict[str, Any] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    size: str | None = None
    bands: ModuleBands | None = None

    def __post_init__(self) -> None:
        measured = {name: Band.of(curves, FLOORS[name]) for name, curves in self._judged().items()}
        self.centre: dict[str, Floats] = {name: band.centre for name, band in measured.items()}
        self.limit: dict[str, Floats] = {name: band.limit(self.factor) for name, band in measured.items()}

    def _judged(self) -> dict[str, Floats]:
        return {LOSS: self.curves} if self.norms is None else {LOSS: self.curves, NORM: self.norms}

    @classmethod
    def measure(
        cls,
        step: Steps,
        curves: Floats,
        false_alarms: float = FALSE_ALARMS,
        norms: Floats | None = None,
        bands: ModuleBands | None = None,
        **more: Any,
    ) -> Envelope:
        """The envelope of K >= 2 runs over the same steps; one widening for losses and gradient norms together.

        Where modules are judged, too, half of the false alarms is theirs.
        """
        if len(curves) < 3:
            return cls(step, curves, None, FACTOR_OF_TWO, norms, bands=bands, **more)
        found = strays(curves, floor=FLOOR)
        if norms is not None:
            found = np.maximum(found, strays(norms, floor=NORM_FLOOR))
        share = false_alarms if bands is None else false_alarms / 2
        return cls(step, curves, false_alarms, widening(found, share), norms, bands=bands, **more)

    def outside(self, curve: Floats, name: str = LOSS) -> npt.NDArray[np.bool_]:
        """At which steps a curve over the same steps is outside."""
        centre = self.centre[name]
        deviation = np.abs(curve - centre) / np.maximum(np.abs(centre), TINY)
        return np.asarray(~(deviation <= self.limit[name]))

    def leave_one_out(self) -> int | None:
        """How many of the K runs the envelope of the others calls departed; None with fewer than four runs."""
        if len(self.curves) < 4 or self.false_alarms is None:
            return None
        departed = 0
        for left_out in range(len(self.curves)):
            judged = self._judged()
            others = {name: np.delete(curves, left_out, axis=0) for name, curves in judged.items()}
            envelope = Envelope.measure(
                self.step, others[LOSS], self.false_alarms, others.get(NORM), self.bands
            )
            departed += any(envelope.outside(curves[left_out], name).any() for name, curves in judged.items())
        return departed

    def sentence(self) -> str:
        """What it is, for a person."""
        limit = self.limit[LOSS]
        rate = (
            "no false-alarm rate can be claimed for two runs"
            if self.false_alarms is None
            else f"false-alarm rate {self.false_alarms:.1%}"
        )
        started = f", started {self.size} apart" if self.size else ""
        return (
            f"envelope of {len(self.curves)} runs{started}, steps {self.step[0]} to {self.step[-1]}: allows "
            f"the loss {limit[0]:.1e} at the first step and {limit[-1]:.1e} at the last; widened {self.factor:.1f} "
            f"times, {rate}"
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
            more = {} if self.bands is None else self.bands.arrays()
            if self.norms is not None:
                more["norms"] = self.norms
            np.savez_compressed(file, about=text, step=self.step, curves=self.curves, **more)


def read_envelope(path: Path) -> Envelope:
    """Read an envelope; never executes code from the file.

    Raises:
        RecordError: it is missing, damaged, or of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            step, curves = file["step"].astype(np.int64), file["curves"].astype(np.float64)
            norms = file["norms"].astype(np.float64) if "norms" in file else None
            bands = ModuleBands.from_arrays(file)
        if about["type"] != "xtrain envelope":
            raise ValueError(f"its type is {about['type']!r}")
        if about["version"] != VERSION:
            found = about["version"]
            raise ValueError(f"version {found}, and this xtrain reads {VERSION}: measure it again")
        if curves.ndim != 2 or len(curves) < 2 or curves.shape[1] != len(step) or not len(step):
            raise ValueError(f"{curves.shape} losses for {len(step)} steps")
        if norms is not None and norms.shape != curves.shape:
            raise ValueError(f"{norms.shape} gradient norms for {curves.shape} losses")
        return Envelope(
            step,
            curves,
            about["false_alarms"],
            float(about["factor"]),
            norms,
            about["header"],
            about["sources"],
            about["size"],
            bands,
        )
    except FileNotFoundError:
        raise RecordError(f"{path} does not exist: measure it with `xtrain align envelope`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, EOFError) as error:
        raise RecordError(f"{path} is not an envelope that can be read: {error}") from None


def measure_records(
    records: Sequence[Record], false_alarms: float = FALSE_ALARMS, size: str | None = None
) -> Envelope:
    """The envelope of recorded runs over the steps that all of them have.

    Raises:
        RecordError: fewer than two runs, no step in common, a loss that is not finite, or all runs the same.
    """
    if len(records) < 2:
        raise RecordError(
            "an envelope needs two runs at least; from three on a false-alarm rate can be claimed"
        )
    steps = records[0].step
    for record in records[1:]:
        steps = np.intersect1d(steps, record.step, assume_unique=True)
    if not len(steps):
        raise RecordError(
            f"the runs have no step in common: {', '.join(str(record.path) for record in records)}"
        )
    curves = np.stack([record.loss[np.searchsorted(record.step, steps)] for record in records])
    for record, curve in zip(records, curves, strict=True):
        if not np.isfinite(curve).all():
            step = steps[int(np.argmin(np.isfinite(curve)))]
            raise RecordError(
                f"{record.path} has no finite loss at step {step}: it is no correct run to measure by"
            )
    if len(np.unique(curves, axis=0)) < len(curves):
        raise RecordError(
            "two of the runs are the same to the last bit, so their spread says nothing: start each from weights "
            "perturbed by another seed (`xtrain align envelope --runs K -- COMMAND` does)"
        )
    norms = np.stack([record.column(NORM)[np.searchsorted(record.step, steps)] for record in records])
    tables = [record.modules for record in records if record.modules is not None]
    bands = measure_bands(tables, false_alarms / 2) if len(tables) == len(records) else None
    return Envelope.measure(
        steps,
        curves,
        false_alarms,
        norms if np.isfinite(norms).all() else None,
        header=records[0].header,
        sources=[str(record.path) for record in records],
        size=size,
        bands=bands,
    )
