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

from xtrain.align.band import TINY, Band, Factors, allow_grid, floors, grid_of, outside, strays
from xtrain.align.module_bands import ModuleBands, measure_bands
from xtrain.align.record import Floats, Record, Steps
from xtrain.align.windows import Windows, means, tiling
from xtrain.base.errors import RecordError
from xtrain.base.files import atomic_path
from xtrain.base.run_folder import PERTURB_VARIABLE

VERSION = 3
FALSE_ALARMS = 0.01
FACTORS_OF_TWO = Factors(10.0, 100.0)
"""Widening for two runs, of which nothing can be left out: a guess, for which no false-alarm rate is claimed."""
WIDE = 20.0
"""A lasting factor above it is told: such a band hides defects."""
LOSS, NORM = "loss", "grad_norm"
"""The columns that are judged."""


def _floors(curves: Floats, floor: float) -> dict[str, Any]:
    """For Band.of: a loss that is computed in 16 bits lies on a grid."""
    least, smallest = allow_grid(grid_of(curves), floor)
    return {"floor": least, "smallest": smallest}


@dataclass
class Envelope:
    """A measured band, with the runs it was measured from.

    Attributes:
        step, curves: steps that all runs have; their losses, shape (K, steps).
        norms: their gradient norms, of the same shape; None when they have none. Steps at which one of them is not
            finite are not judged.
        false_alarms: share of correct runs that it may call departed; None where none can be claimed (two runs).
        factors: scales that are allowed.
        centre, limit, once: mean, largest relative deviation from it that may last, and that may happen once, at
            every step, by name of the curve.
        header: of the first run.
        sources: where the runs were read.
        size: relative size of the perturbation that the runs started with; 0: what rounding does; None: not known.
        bands: of the module statistics, when all runs have them.
    """

    step: Steps
    curves: Floats
    false_alarms: float | None
    factors: Factors
    norms: Floats | None = None
    header: dict[str, Any] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    size: float | None = None
    bands: ModuleBands | None = None

    def __post_init__(self) -> None:
        allowed = dict(zip((LOSS, NORM), floors(self.size or 0.0), strict=False))
        measured = {
            name: Band.of(curves, **_floors(curves, allowed[name])) for name, curves in self._judged().items()
        }
        self.centre: dict[str, Floats] = {name: band.centre for name, band in measured.items()}
        self.limit: dict[str, Floats] = {}
        self.once: dict[str, Floats] = {}
        for name, band in measured.items():
            self.limit[name], self.once[name] = (
                band.limit(self.factors.lasting),
                band.limit(self.factors.once),
            )

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
        size: float | None = None,
        **more: Any,
    ) -> Envelope:
        """The envelope of K >= 2 runs over the same steps; one widening for losses and gradient norms together.

        Where modules are judged, too, half of the false alarms is theirs.
        """
        more |= {"bands": bands, "size": size}
        if len(curves) < 3:
            return cls(step, curves, None, FACTORS_OF_TWO, norms, **more)
        loss_floor, norm_floor, _ = floors(size or 0.0)
        found = strays(curves, **_floors(curves, loss_floor))
        if norms is not None:
            found = np.maximum(found, strays(norms, **_floors(norms, norm_floor)))
        share = false_alarms if bands is None else false_alarms / 2
        return cls(step, curves, false_alarms, Factors.of(found, share), norms, **more)

    def outside(self, curve: Floats, name: str = LOSS) -> npt.NDArray[np.bool_]:
        """At which steps a curve over the same steps is outside."""
        centre = self.centre[name]
        deviation = np.abs(curve - centre) / np.maximum(np.abs(centre), TINY)
        return outside(deviation, self.limit[name], self.once[name])

    def over_windows(self, begins: Steps, ends: Steps) -> Envelope | None:
        """The envelope of the same runs averaged over windows of steps, measured anew; module bands stay.

        Args:
            begins, ends: of each window the step after which it begins, and its last step; ascending. Losses are
                averaged, and gradient norms those of the last step.

        Returns:
            None where it has not all steps of any window of several. Windows that it lacks steps of are left out.
        """
        first, last = tiling(self.step - 1, self.step, Windows(begins, ends))
        made = last >= 0
        if not (made & (ends - begins > 1)).any():
            return None
        first, last = first[made], last[made]
        return Envelope.measure(
            ends[made],
            means(self.curves, np.ones(len(self.step), np.int64), first, last),
            FALSE_ALARMS if self.false_alarms is None else self.false_alarms,
            None if self.norms is None else self.norms[:, last],
            self.bands,
            self.size,
            header=self.header,
            sources=self.sources,
        )

    def leave_one_out(self) -> int | None:
        """How many of the K runs the envelope of the others calls departed; None with fewer than four runs."""
        if len(self.curves) < 4 or self.false_alarms is None:
            return None
        departed = 0
        for left_out in range(len(self.curves)):
            judged = self._judged()
            others = {name: np.delete(curves, left_out, axis=0) for name, curves in judged.items()}
            envelope = Envelope.measure(
                self.step, others[LOSS], self.false_alarms, others.get(NORM), self.bands, self.size
            )
            departed += any(envelope.outside(curves[left_out], name).any() for name, curves in judged.items())
        return departed

    def wide(self) -> list[tuple[str, Factors]]:
        """What is allowed to stray so far that defects hide in it: curves, and statistics of modules."""
        found = [] if self.false_alarms is None else [("losses and gradient norms", self.factors)]
        if self.bands is not None:
            found += [(f"{name} of modules", factors) for name, factors in self.bands.factors.items()]
        return [(what, factors) for what, factors in found if factors.lasting > WIDE]

    def sentence(self) -> str:
        """What it is, for a person."""
        limit = self.limit[LOSS]
        rate = (
            "no false-alarm rate can be claimed for two runs"
            if self.false_alarms is None
            else f"false-alarm rate {self.false_alarms:.1%}"
        )
        perturbed = (
            "" if self.size is None else f", perturbed by {f'{self.size:g}' if self.size else 'rounding'}"
        )
        return (
            f"envelope of {len(self.curves)} runs{perturbed}, steps {self.step[0]} to {self.step[-1]}: allows "
            f"the loss {limit[0]:.1e} at the first step and {limit[-1]:.1e} at the last; widened "
            f"{self.factors.lasting:.1f} times ({self.factors.once:.1f} for a single step), {rate}"
            + ("" if self.bands is None else f"; {self.bands.sentence()}")
        )

    def save(self, path: Path) -> None:
        """Write it to a .npz file, completely or not at all."""
        about = {
            "type": "xtrain envelope",
            "version": VERSION,
            "false_alarms": self.false_alarms,
            "factors": {"lasting": self.factors.lasting, "once": self.factors.once},
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
            Factors(float(about["factors"]["lasting"]), float(about["factors"]["once"])),
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


def _perturbed_by(records: Sequence[Record]) -> float | None:
    """The largest perturbation that headers tell of: 0 for one ulp, None where none does."""
    sizes = []
    for record in records:
        told = record.header.get("environment", {}).get("variables", {}).get(PERTURB_VARIABLE)
        if told is not None:
            sizes.append(float(str(told).partition(":")[2] or 0.0))
    return max(sizes, default=None)


def measure_records(
    records: Sequence[Record], false_alarms: float = FALSE_ALARMS, size: float | None = None
) -> Envelope:
    """The envelope of recorded runs over the steps that all of them have.

    Args:
        size: of their perturbations; None: as their headers say.

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
            "two of the runs are the same to the last bit, so their spread says nothing: record runs that round "
            f"otherwise, each with another seed in {PERTURB_VARIABLE}"
        )
    norms = np.stack([record.column(NORM)[np.searchsorted(record.step, steps)] for record in records])
    tables = [record.modules for record in records if record.modules is not None]
    size = _perturbed_by(records) if size is None else size
    floor = floors(size or 0.0)[2]
    bands = measure_bands(tables, false_alarms / 2, floor) if len(tables) == len(records) else None
    return Envelope.measure(
        steps,
        curves,
        false_alarms,
        norms if np.isfinite(norms).all(axis=0).mean() > 0.5 else None,  # in 16 bits some overflow
        header=records[0].header,
        sources=[str(record.path) for record in records],
        size=size,
        bands=bands,
    )
