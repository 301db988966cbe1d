"""What `initialize(optimizer=...)` and `initialize(lr_scheduler=...)` take as functions, for scripts' annotations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

DeepSpeedOptimizerCallable = Callable[[Iterable[nn.Parameter] | list[dict[str, Any]]], Optimizer]
"""Makes an optimizer of parameters, or of parameter groups."""
DeepSpeedSchedulerCallable = Callable[[Optimizer], Any]
"""Makes a schedule of an optimizer; it needs `step()`, and `state_dict` and `load_state_dict` to be in checkpoints."""
