"""Which module departs first, and in which phase of the step: two tables of module statistics. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xtrain.align.band import outside
from xtrain.align.module_bands import ModuleBands, relative_to, size_of
from xtrain.align.module_table import ModuleTable, Single, Steps

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


_SCALED = ("backward", "gradient")
"""Phases of numbers that the loss scale multiplies: at which step they overflow is noise."""
_RESTLESS = ("max_abs", "projection")
"""Not judged by a tolerance that was not measured: one element's magnitude, and what sees single elements round."""


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
        apart = (reference > 0) != (candidate > 0)
        if self.bands is None and self.tolerance == 0:
            apart = reference != candidate
        elif self.bands is not None and phase in self.bands.steps:
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
                relative = relative_to(table, phase, statistic)
                size = centre
                if relative is not None:
                    size = size_of(statistic, cut(table, relative, mine, self.mine), centre)
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
