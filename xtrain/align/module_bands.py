"""What is allowed of module statistics: bands measured from correct runs. Imports no torch.

The statistical model is in xtrain.align.band, and in docs/alignment.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xtrain.align.band import MODULE_FLOOR, Band, Factors, allow_average, allow_grid, grid_of, strays
from xtrain.align.module_table import PHASES, STATISTICS, ModuleTable, Single, Steps
from xtrain.align.record import Floats

HALF_WINDOW = 2
_PARTS = ("centre", "scale", "floor")


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
    return _Measuring([table.ordered(names) for table in tables], floor).run(false_alarms)


class _Measuring:
    """One measurement while it is made."""

    def __init__(self, tables: Sequence[ModuleTable], floor: float) -> None:
        self.tables, self.floor = tables, floor
        self.bands = ModuleBands(tables[0].names)
        self._strayed: dict[str, Any] = {}  # how far each run strays, (2, K) by statistic
        self._grids: dict[str, Floats] = {}

    def run(self, false_alarms: float) -> ModuleBands:
        for phase in self.tables[0].phases():
            if any(phase not in table.steps for table in self.tables):
                continue
            steps = self.tables[0].steps[phase]
            for table in self.tables[1:]:
                steps = np.intersect1d(steps, table.steps[phase], assume_unique=True)
            if len(steps):
                self.bands.steps[phase] = steps
                self._phase(phase)
        strayed = list(self._strayed.values())
        for statistic, found in self._strayed.items():
            self.bands.factors[statistic] = Factors.of(found, false_alarms / len(strayed), strayed)
        return self.bands

    def _curves(self, phase: str, statistic: str) -> Floats:
        """(K, snapshots, modules)."""
        steps = self.bands.steps[phase]
        return np.stack(
            [
                table.values[phase, statistic][np.searchsorted(table.steps[phase], steps)].astype(np.float64)
                for table in self.tables
            ]
        )

    def _phase(self, phase: str) -> None:
        counts = self._curves(phase, "nonfinite")
        self.bands.overflow[phase] = np.stack([(counts == 0).any(axis=0), (counts > 0).any(axis=0)])
        grid = self._grids[phase] = grid_of(self._curves(phase, "max_abs"))
        if phase == "gradient":  # rounded like what comes back, and then added up in float32
            grid = np.maximum(grid, self._grids.get("backward", grid))
        for statistic in self.tables[0].statistics(phase):
            # Of records of before, some statistics are not there.
            if statistic != "nonfinite" and all((phase, statistic) in table.values for table in self.tables):
                self._statistic(phase, statistic, grid)

    def _statistic(self, phase: str, statistic: str, grid: Floats) -> None:
        relative = relative_to(self.tables[0], phase, statistic)
        curves, key = self._curves(phase, statistic), (phase, statistic)
        base: Any = None if relative is None else self._curves(phase, relative).mean(axis=0)
        if (
            statistic == "projection"
        ):  # signs that do not cancel make it as large as a sum, and so is its rounding
            base = np.maximum(base, np.abs(curves.mean(axis=0)))
        # The largest magnitude is one element, and lies on the grid itself.
        floor, smallest = (allow_grid if statistic == "max_abs" else allow_average)(grid, self.floor)
        options = {"floor": floor, "half_window": HALF_WINDOW, "base": base, "smallest": smallest}
        band = Band.of(curves, **options)
        self.bands.centre[key] = band.centre.astype(np.float32)
        self.bands.scale[key] = band.scale.astype(np.float32)
        self.bands.floor[key] = floor.astype(np.float32)
        found = strays(curves, **options)
        self._strayed[statistic] = np.maximum(self._strayed.get(statistic, 0.0), found)


def relative_to(table: ModuleTable, phase: str, statistic: str) -> str | None:
    """The statistic that deviations are relative to, for those that may be near zero; None: their own size."""
    if statistic == "projection":
        return "rms"
    return _scale_of(table, phase) if statistic == "mean" else None


def _scale_of(table: ModuleTable, phase: str) -> str:
    return "abs_mean" if (phase, "abs_mean") in table.values else "rms"


def size_of(statistic: str, relative: Any, centre: Any) -> Any:
    """What deviations are relative to, from the values of `relative_to` and of the statistic itself.

    A projection whose signs do not cancel is as large as a sum, and so is its rounding.
    """
    return np.fmax(relative, np.abs(centre)) if statistic == "projection" else relative
