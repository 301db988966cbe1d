"""Which module departs first, and in which phase of the step: two tables of module statistics. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xtrain.align.band import MODULE_FLOOR, Band, Factors, outside, strays
from xtrain.align.module_table import PHASES, STATISTICS, ModuleTable, Single, Steps

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
    """What is allowed of each statistic: centre and scale, (snapshots, modules), by (phase, statistic)."""

    names: list[str]
    steps: dict[str, Steps] = field(default_factory=dict)
    centre: dict[tuple[str, str], Single] = field(default_factory=dict)
    scale: dict[tuple[str, str], Single] = field(default_factory=dict)
    factors: Factors = Factors(1.0, 1.0)  # noqa: RUF009 - it is frozen
    floor: float = MODULE_FLOOR

    def limits(self, key: tuple[str, str]) -> tuple[Single, Single]:
        """Relative deviations that may last, and that may happen once."""
        scale, floor = self.scale[key], np.float32(self.floor)
        scale = np.where(np.isnan(scale), np.float32(np.inf), scale)  # the module did not run
        lasting, once = np.float32(self.factors.lasting), np.float32(self.factors.once)
        return np.maximum(scale * lasting, floor), np.maximum(scale * once, floor)

    def arrays(self) -> dict[str, Any]:
        """For np.savez."""
        allowed = np.array([self.factors.lasting, self.factors.once, self.floor])
        found: dict[str, Any] = {"modules": np.array(self.names), "module_limits": allowed}
        for phase, steps in self.steps.items():
            found[f"{phase}/step"] = steps
        for (phase, statistic), centre in self.centre.items():
            found[f"{phase}/{statistic}/centre"] = centre
            found[f"{phase}/{statistic}/scale"] = self.scale[phase, statistic]
        return found

    @classmethod
    def from_arrays(cls, file: Any) -> ModuleBands | None:
        """What `arrays` returned; None when there was none."""
        if "modules" not in file:
            return None
        lasting, once, floor = file["module_limits"].tolist()
        bands = cls([str(name) for name in file["modules"]], factors=Factors(lasting, once), floor=floor)
        for phase in PHASES:
            if f"{phase}/step" not in file:
                continue
            bands.steps[phase] = file[f"{phase}/step"]
            for statistic in STATISTICS:
                if f"{phase}/{statistic}/centre" in file:
                    bands.centre[phase, statistic] = file[f"{phase}/{statistic}/centre"]
                    bands.scale[phase, statistic] = file[f"{phase}/{statistic}/scale"]
        return bands


def measure_bands(
    tables: Sequence[ModuleTable], false_alarms: float, floor: float = MODULE_FLOOR
) -> ModuleBands | None:
    """Bands from the tables of K >= 3 runs, by the model of xtrain.align.envelope; None where they don't fit.

    One widening for everything: so many scales does no statistic of no module of a correct run stray, but for
    `false_alarms` of the runs.
    """
    names = tables[0].names
    if len(tables) < 3 or any(sorted(table.names) != sorted(names) for table in tables):
        return None
    tables = [table.ordered(names) for table in tables]
    bands = ModuleBands(names, floor=floor)
    strayed = np.zeros((2, len(tables)))
    for phase in tables[0].phases():
        if any(phase not in table.steps for table in tables):
            continue
        steps = tables[0].steps[phase]
        for table in tables[1:]:
            steps = np.intersect1d(steps, table.steps[phase], assume_unique=True)
        if not len(steps):
            continue
        bands.steps[phase] = steps
        rows = [np.searchsorted(table.steps[phase], steps) for table in tables]
        for statistic in tables[0].statistics(phase):
            if statistic == "nonfinite":
                continue  # there, any difference counts
            curves = np.stack(
                [
                    table.values[phase, statistic][row].astype(np.float64)
                    for table, row in zip(tables, rows, strict=True)
                ]
            )
            base = None
            if statistic == "mean":  # which may be near zero
                magnitudes = [
                    table.values[phase, _scale_of(table, phase)][row]
                    for table, row in zip(tables, rows, strict=True)
                ]
                base = np.mean(magnitudes, axis=0)
            band = Band.of(curves, floor, HALF_WINDOW, base)
            bands.centre[phase, statistic] = band.centre.astype(np.float32)
            bands.scale[phase, statistic] = band.scale.astype(np.float32)
            options = {"floor": floor, "half_window": HALF_WINDOW, "base": base}
            strayed = np.maximum(strayed, strays(curves, **options))
    bands.factors = Factors.of(strayed, false_alarms)
    return bands


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
        self, reference: ModuleTable, candidate: ModuleTable, tolerance: float, bands: ModuleBands | None
    ) -> None:
        self.reference, self.candidate = reference, candidate
        self.tolerance, self.bands = tolerance, bands
        known = set(candidate.names)
        self.names = [name for name in reference.names if name in known]
        self.mine = [reference.names.index(name) for name in self.names]
        place = {name: index for index, name in enumerate(candidate.names)}
        self.its = [place[name] for name in self.names]
        self.result = ModuleComparison(self.names)
        lost = (len(reference.names) - len(self.names), len(candidate.names) - len(self.names))
        if any(lost):
            self.result.notes.append(
                f"{lost[0]} modules stand in the reference only and {lost[1]} in the candidate only: the models differ"
            )

    def run(self) -> ModuleComparison:
        for phase in self.reference.phases():
            if self.names and phase in self.candidate.steps:
                self._phase(phase)
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
        for statistic in table.statistics(phase):
            if (phase, statistic) not in other.values:
                continue
            reference = cut(table, statistic, mine, self.mine)
            candidate = cut(other, statistic, its, self.its)
            if statistic == "nonfinite":
                deviation = np.where(reference != candidate, np.float32(np.inf), np.float32(0))
                limit: Any = np.float32(0)
                once = limit
            else:
                centre, limit, once = self._limits(phase, statistic, steps, reference)
                size = centre
                if statistic == "mean":
                    size = cut(table, _scale_of(table, phase), mine, self.mine)
                deviation = _deviation(centre, candidate, size)
            deviation = np.where(absent, np.float32(np.nan), deviation)
            if statistic != "max_abs" or np.ndim(limit) or self.tolerance == 0:
                # One element's magnitude is too restless for a tolerance that was not measured.
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
    reference: ModuleTable, candidate: ModuleTable, tolerance: float, bands: ModuleBands | None = None
) -> ModuleComparison:
    """Compare two tables where they overlap.

    Args:
        tolerance: of relative differences (of the mean: relative to the mean magnitude), where there is no band;
            `max_abs` is judged by none but zero.
        bands: measured, of the reference's modules; their limits are taken instead.
    """
    return _Comparing(reference, candidate, tolerance, bands).run()
