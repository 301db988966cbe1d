"""Statistics of a model's modules over the steps, by phase. Imports no torch; xtrain.align.statistics gathers them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

PHASES = ("forward", "backward", "gradient", "optimizer")
"""In the order of a step: outputs of the modules, gradients of the loss by those outputs, gradients of
their parameters before clipping, their parameters after the update."""
STATISTICS = ("mean", "abs_mean", "rms", "max_abs", "projection", "nonfinite")
"""`projection` is the sum of all elements, each with a sign that depends on its place in the last dimension, over the
root of their number: other roundings of single elements, which cancel in means, move it by their own relative size. It
is there for outputs and the gradients by them, where no rank holds a part of the features."""
OPTIONAL = ("projection",)
"""Statistics that older records, and some phases, do not have."""

Single = npt.NDArray[np.float32]
Steps = npt.NDArray[np.int64]


@dataclass
class ModuleTable:
    """Float32 arrays of shape (snapshots, modules) by (phase, statistic), and the steps of the snapshots.

    Attributes:
        names: of the modules, in the order in which they ran.
    """

    names: list[str]
    steps: dict[str, Steps] = field(default_factory=dict)
    values: dict[tuple[str, str], Single] = field(default_factory=dict)

    def put(self, phase: str, statistic: str, steps: Steps, values: Single) -> None:
        """Set the snapshots of one statistic; all statistics of a phase have the same steps."""
        self.steps[phase] = steps
        self.values[phase, statistic] = values

    def phases(self) -> list[str]:
        """The phases that are there, in the order of a step."""
        return [phase for phase in PHASES if phase in self.steps]

    def statistics(self, phase: str) -> list[str]:
        """The statistics that are there for a phase."""
        return [statistic for statistic in STATISTICS if (phase, statistic) in self.values]

    def ordered(self, names: list[str]) -> ModuleTable:
        """The same with its modules in another order."""
        if names == self.names:
            return self
        place = {name: index for index, name in enumerate(self.names)}
        columns = [place[name] for name in names]
        return ModuleTable(
            names, dict(self.steps), {key: values[:, columns] for key, values in self.values.items()}
        )
