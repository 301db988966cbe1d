"""Parameters that have a gradient and that the engine does not train."""

from __future__ import annotations

import logging

from torch import nn

from xtrain.base.log import log_dist
from xtrain.zero import names
from xtrain.zero.partition import Partition


class Untrained:
    """Clears their gradients, and says once of those that were unfrozen too late."""

    def __init__(self, module: nn.Module, partition: Partition) -> None:
        self._module = module
        trained = {param for group in partition.trained for param in group.members}
        self._params = [p for p in module.parameters() if p.requires_grad and p not in trained]
        self._known = trained | set(self._params)

    def after_update(self) -> None:
        """Look at the model once more, and clear."""
        late = {
            name: param
            for name, param in names.parameters(self._module)
            if param.requires_grad and param not in self._known
        }
        if late:
            self._known.update(late.values())
            self._params += late.values()
            log_dist(
                f"{len(late)} parameters are not trained, {next(iter(late))!r} the first of them: they were frozen, or "
                "not there, when initialize() divided the model. Freeze parameters after it, or build a new engine",
                ranks=[0],
                level=logging.WARNING,
            )
        for param in self._params:
            param.grad = None
