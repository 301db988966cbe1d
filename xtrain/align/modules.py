"""Which module departs first, and in which phase of the step: two tables of module statistics. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xtrain.align.band import (
    MODULE_FLOOR,
    Band,
    Factors,
    allow_average,
    allow_grid,
    grid_of,
    outside,
    strays,
)
from xtrain.align.module_table import PHASES, STATISTICS, ModuleTable, Single, Steps
from xtrain.align.record import Floats

HALF_WINDOW = 2
_ULP = 1.2e-7
_TINY = 1e-30


@dataclass(frozen=True)
class Departure:
    """A statistic of a module that the policy does not allow."""

    step: int
    phase: str
    module: str
    statistic: str
    reference: float
    candidate: float

    def sentence(self) -> str:
        """For a person."""
        what = {
            "forward": "its output",
            "backward": "the gradient that comes back to it",
            "gradient": "the gradient of its parameters",
            "optimizer": "its parameters after the update",
        }[self.phase]
        return (
            f"the first module that departs is {self.module or 'the model itself'}, in phase {self.phase} of step "
            f"{self.step}: {self.statistic} of {what} is {self.candidate:.6g} instead of {self.reference:.6g}"
        )


@dataclass
class ModuleComparison:
    """The outcome over modules and snapshots that both tables have.

    Attributes:
        names: modules of both.
        heat: for each phase steps, and deviations in units of what is allowed, shape (snapshots, modules):
            the largest over the statistics. What is not in both is NaN.
        first: the first departure; None: none.
        notes: what could not be compared.
    """

    names: list[str]
    heat: dict[str, tuple[Steps, Single]] = field(default_factory=dict)
    first: Departure | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def snapshots(self) -> int:
        """Measured steps that were compared."""
        return max((len(steps) for steps, _ in self.heat.values()), default=0)

    def sentence(self) -> str:
        """For a person."""
        if self.first is not None:
            return self.first.sentence()
        return f"no module departs: {len(self.names)} modules, {self.snapshots} measured steps"


@dataclass
class ModuleBands:
    """What is allowed of each statistic.

    Attributes:
        names: of the modules.
        steps: of the snapshots, by phase.
        centre, scale: (snapshots, modules), by (phase, statistic).
        floor: relative deviation that is always allowed, (modules,), by (phase, statistic).
        overflow: whether a run had no element that is not finite, and whether one had some: (2, snapshots, modules),
            by phase.
        factors: scales that are allowed, by statistic: how much one may stray says nothing of the others.
    """

    names: list[str]
    steps: dict[str, Steps] = field(default_factory=dict)
    centre: dict[tuple[str, str], Single] = field(default_factory=dict)
    scale: dict[tuple[str, str], Single] = field(default_factory=dict)
    floor: dict[tuple[str, str], Single] = field(default_factory=dict)
    overflow: dict[str, Any] = field(default_factory=dict)
    factors: dict[str, Factors] = field(default_factory=dict)

    def limits(self, key: tuple[str, str]) -> tuple[Single, Single]:
        """Relative deviations that may last, and that may happen once."""
        scale, floor, factors = self.scale[key], self.floor[key], self.factors[key[1]]
        scale = np.where(np.isnan(scale), np.float32(np.inf), scale)  # the module did not run
        lasting, once = np.float32(factors.lasting), np.float32(factors.once)
        return np.maximum(scale * lasting, floor), np.maximum(scale * once, floor)

    @property
    def widest(self) -> tuple[str, Factors]:
        """The statistic with the largest lasting factor, and its factors."""
        return max(self.factors.items(), key=lambda item: item[1].lasting)

    def sentence(self) -> str:
        """How wide the bands are, for a person."""
        told = ", ".join(
            f"{statistic} {factors.lasting:.1f} ({factors.once:.1f})"
            for statistic, factors in self.factors.items()
        )
        return f"bands of {len(self.names)} modules: widened, by statistic (for a single step): {told}"

    def arrays(self) -> dict[str, Any]:
        """For np.savez."""
        found: dict[str, Any] = {"modules": np.array(self.names)}
        for statistic, factors in self.factors.items():
            found[f"factors/{statistic}"] = np.array([factors.lasting, factors.once])
        for phase, steps in self.steps.items():
            found[f"{phase}/step"], found[f"{phase}/overflow"] = steps, self.overflow[phase]
        for phase, statistic in self.centre:
            for part in _PARTS:
                found[f"{phase}/{statistic}/{part}"] = getattr(self, part)[phase, statistic]
        return found

    @classmethod
    def from_arrays(cls, file: Any) -> ModuleBands | None:
        """What `arrays` returned; None when there was none."""
        if "modules" not in file:
            return None
        bands = cls([str(name) for name in file["modules"]])
        for phase in PHASES:
            if f"{phase}/step" not in file:
                continue
            bands.steps[phase], bands.overflow[phase] = file[f"{phase}/step"], file[f"{phase}/overflow"]
            for statistic in STATISTICS:
                if f"{phase}/{statistic}/centre" not in file:
                    continue
                bands.factors[statistic] = Factors(*file[f"factors/{statistic}"].tolist())
                for part in _PARTS:
                    getattr(bands, part)[phase, statistic] = file[f"{phase}/{statistic}/{part}"]
        return bands


_SCALED = ("backward", "gradient")
"""Phases of numbers that the loss scale multiplies: at which step they overflow is noise."""
_RESTLESS = ("max_abs", "projection")
"""Not judged by a tolerance that was not measured: one element's magnitude, and what sees single elements round."""
_PARTS = ("centre", "scale", "floor")


def measure_bands(
    tables: Sequence[ModuleTable], false_alarms: float, floor: float = MODULE_FLOOR
) -> ModuleBands | None:
    """Bands from the tables of K >= 3 runs, by the model of xtrain.align.band; None where they don't fit.

    One widening for each statistic: so many scales does it not stray in any module of a correct run, but for its share
    of `false_alarms` of the runs.

    Args:
        floor: relative deviation that is always allowed of statistics that lie on no coarse grid.
    """
    names = tables[0].names
    if len(tables) < 3 or any(sorted(table.names) != sorted(names) for table in tables):
        return None
    tables = [table.ordered(names) for table in tables]
    bands = ModuleBands(names)
    strayed: dict[str, Any] = {}
    grids: dict[str, Floats] = {}
    for phase in tables[0].phases():
        if any(phase not in table.steps for table in tables):
            continue
        steps = tables[0].steps[phase]
        for table in tables[1:]:
            steps = np.intersect1d(steps, table.steps[phase], assume_unique=True)
        if len(steps):
            bands.steps[phase] = steps
            _measure_phase(bands, phase, tables, floor, strayed, grids)
    for statistic, found in strayed.items():
        bands.factors[statistic] = Factors.of(found, false_alarms / len(strayed), list(strayed.values()))
    return bands


def _measure_phase(
    bands: ModuleBands,
    phase: str,
    tables: Sequence[ModuleTable],
    floor: float,
    strayed: dict[str, Any],
    grids: dict[str, Floats],
) -> None:
    """Bands of all statistics of a phase; `strayed` gets how far each run strays, (2, K) by statistic."""
    steps = bands.steps[phase]
    rows = [np.searchsorted(table.steps[phase], steps) for table in tables]

    def of_runs(statistic: str) -> Floats:
        return np.stack(
            [
                table.values[phase, statistic][row].astype(np.float64)
                for table, row in zip(tables, rows, strict=True)
            ]
        )

    counts = of_runs("nonfinite")
    bands.overflow[phase] = np.stack([(counts == 0).any(axis=0), (counts > 0).any(axis=0)])
    grid = grids[phase] = grid_of(of_runs("max_abs"))
    if phase == "gradient":  # rounded like what comes back, and then added up in float32
        grid = np.maximum(grid, grids.get("backward", grid))
    for statistic in tables[0].statistics(phase):
        if statistic == "nonfinite" or any((phase, statistic) not in table.values for table in tables):
            continue  # an older record is among them
        curves = of_runs(statistic)
        relative = _relative_to(tables[0], phase, statistic)
        base = None if relative is None else of_runs(relative).mean(axis=0)
        # The largest magnitude is one element, and lies on the grid itself.
        least, smallest = (allow_grid if statistic == "max_abs" else allow_average)(grid, floor)
        options = {"floor": least, "half_window": HALF_WINDOW, "base": base, "smallest": smallest}
        band = Band.of(curves, **options)
        key = (phase, statistic)
        bands.centre[key], bands.scale[key] = band.centre.astype(np.float32), band.scale.astype(np.float32)
        bands.floor[key] = least.astype(np.float32)
        found = strays(curves, **options)
        strayed[statistic] = np.maximum(strayed.get(statistic, 0.0), found)


def _relative_to(table: ModuleTable, phase: str, statistic: str) -> str | None:
    """The statistic that deviations are relative to, for those that may be near zero; None: their own size."""
    if statistic == "projection":
        return "rms"
    return _scale_of(table, phase) if statistic == "mean" else None


def _scale_of(table: ModuleTable, phase: str) -> str:
    return "abs_mean" if (phase, "abs_mean") in table.values else "rms"


def _deviation(reference: Single, candidate: Single, size: Single) -> Single:
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.abs(candidate - reference) / np.maximum(np.abs(size), np.float32(_TINY))
    broken = np.isfinite(reference) & ~np.isfinite(candidate)
    both_broken = ~np.isfinite(reference) & ~np.isfinite(candidate)
    return np.asarray(np.where(broken, np.float32(np.inf), np.where(both_broken, np.float32(0), found)))


class _Comparing:
    """One comparison while it is made."""

    def __init__(
        self,
        reference: ModuleTable,
        candidate: ModuleTable,
        tolerance: float,
        bands: ModuleBands | None,
        skipped: Steps,
    ) -> None:
        self.reference, self.candidate = reference, candidate
        self.tolerance, self.bands, self.skipped = tolerance, bands, skipped
        known = set(candidate.names)
        self.names = [name for name in reference.names if name in known]
        self.mine = [reference.names.index(name) for name in self.names]
        place = {name: index for index, name in enumerate(candidate.names)}
        self.its = [place[name] for name in self.names]
        self.result = ModuleComparison(self.names)
        lost = (len(reference.names) - len(self.names), len(candidate.names) - len(self.names))
        if not self.names:
            self.result.notes.append(
                "no module has the same name in both (the reference has "
                f"{reference.names[0] or 'the model itself'}, the candidate "
                f"{candidate.names[0] or 'the model itself'}): modules were not compared"
            )
        elif any(lost):
            self.result.notes.append(
                f"{lost[0]} modules stand in the reference only and {lost[1]} in the candidate only: the models differ"
            )

    def run(self) -> ModuleComparison:
        for phase in self.reference.phases():
            if self.names and phase in self.candidate.steps:
                self._phase(phase)
        if self.names and not self.result.heat:
            self.result.notes.append(
                "both have statistics of modules, but none of the same phase and step: modules were not compared"
            )
        return self.result

    def _limits(self, phase: str, statistic: str, steps: Steps, reference: Single) -> tuple[Single, Any, Any]:
        """(what to compare with, largest relative deviation that may last, that may happen once)."""
        bands, key = self.bands, (phase, statistic)
        if bands is None:
            return reference, np.float32(self.tolerance), np.float32(self.tolerance)
        limit, once = (np.full(reference.shape, np.inf, np.float32) for _ in range(2))
        if key not in bands.centre:
            return reference, limit, once  # it was not measured
        _, here, there = np.intersect1d(steps, bands.steps[phase], assume_unique=True, return_indices=True)
        centre = reference.copy()
        centre[here] = bands.centre[key][there][:, self.mine]
        limit[here], once[here] = (found[there][:, self.mine] for found in bands.limits(key))
        return centre, limit, once

    def _overflow(self, phase: str, steps: Steps, reference: Single, candidate: Single) -> Single:
        """Infinite where elements are not finite that should be, or the other way round; else 0.

        By a tolerance, or by bands, it matters whether there are any: how many gradients overflow in 16 bits is noise.
        """
        if self.bands is None and self.tolerance == 0:
            apart = reference != candidate
        elif self.bands is None or phase not in self.bands.steps:
            apart = (reference > 0) != (candidate > 0)
        else:
            apart = (reference > 0) != (candidate > 0)
            _, here, there = np.intersect1d(
                steps, self.bands.steps[phase], assume_unique=True, return_indices=True
            )
            finite, broken = self.bands.overflow[phase][:, there][:, :, self.mine]
            apart[here] = ~np.where(candidate[here] > 0, broken, finite)
        return np.where(apart, np.float32(np.inf), np.float32(0))

    def _phase(self, phase: str) -> None:
        table, other = self.reference, self.candidate
        steps, mine, its = np.intersect1d(
            table.steps[phase], other.steps[phase], assume_unique=True, return_indices=True
        )
        if not len(steps):
            return

        def cut(of: ModuleTable, statistic: str, rows: Steps, columns: list[int]) -> Single:
            values = of.values[phase, statistic]
            whole = len(rows) == len(values) and columns == list(range(values.shape[1]))
            return values if whole else values[rows][:, columns]

        heat = np.full((len(steps), len(self.names)), np.nan, np.float32)
        departed: dict[str, Any] = {}
        counts = [cut(table, "nonfinite", mine, self.mine), cut(other, "nonfinite", its, self.its)]
        # A module that did not run in one of them has no statistics to compare.
        absent = np.isnan(counts[0]) | np.isnan(counts[1])
        if phase in _SCALED and (self.bands is not None or self.tolerance > 0):
            absent |= np.isin(steps, self.skipped)[:, None]
        for statistic in table.statistics(phase):
            if (phase, statistic) not in other.values:
                continue
            reference = cut(table, statistic, mine, self.mine)
            candidate = cut(other, statistic, its, self.its)
            if self.bands is None and self.tolerance > 0 and statistic in _RESTLESS:
                continue
            if statistic == "nonfinite":
                deviation = self._overflow(phase, steps, reference, candidate)
                limit: Any = np.float32(0)
                once = limit
            else:
                centre, limit, once = self._limits(phase, statistic, steps, reference)
                relative = _relative_to(table, phase, statistic)
                size = centre if relative is None else cut(table, relative, mine, self.mine)
                deviation = _deviation(centre, candidate, size)
            deviation = np.where(absent, np.float32(np.nan), deviation)
            known = np.nan_to_num(deviation, nan=0.0, posinf=np.inf)
            departed[statistic] = known > once if self.bands is None else outside(known, limit, once)
            with np.errstate(invalid="ignore", over="ignore"):
                heat = np.fmax(heat, deviation / np.maximum(limit, np.float32(_ULP)))
        self.result.heat[phase] = (steps, heat)
        if departed:
            self._note_departure(phase, steps, heat, departed, (mine, its))

    def _note_departure(
        self, phase: str, steps: Steps, heat: Single, departed: dict[str, Any], rows: tuple[Steps, Steps]
    ) -> None:
        anywhere = np.logical_or.reduce(list(departed.values()))
        rows_outside = anywhere.any(axis=1)
        if not rows_outside.any():
            return
        row = int(np.argmax(rows_outside))
        step = int(steps[row])
        if self.result.first is not None and self.result.first.step <= step:
            return
        modules = np.flatnonzero(anywhere[row])
        # Forward runs from the first module to the last, backward the other way round; the update is one.
        if phase == "forward":
            module = int(modules[0])
        elif phase == "backward":
            module = int(modules[-1])
        else:
            module = int(
                modules[np.argmax(np.nan_to_num(heat[row, modules], posinf=np.finfo(np.float32).max))]
            )
        statistic = next(name for name, where in departed.items() if where[row, module])
        self.result.first = Departure(
            step,
            phase,
            self.names[module],
            statistic,
            float(self.reference.values[phase, statistic][rows[0][row], self.mine[module]]),
            float(self.candidate.values[phase, statistic][rows[1][row], self.its[module]]),
        )


def compare_modules(
    reference: ModuleTable,
    candidate: ModuleTable,
    tolerance: float,
    bands: ModuleBands | None = None,
    skipped: Steps | None = None,
) -> ModuleComparison:
    """Compare two tables where they overlap.

    Args:
        skipped: steps that one of the runs did not apply because its gradients overflowed; they are not compared.
        tolerance: of relative differences (of the mean: relative to the mean magnitude), where there is no band;
            `max_abs` is judged by none but zero.
        bands: measured, of the reference's modules; their limits are taken instead.
    """
    none = np.array([], np.int64)
    return _Comparing(reference, candidate, tolerance, bands, none if skipped is None else skipped).run()
