"""Modules and parameters that a script puts into a model after `initialize` has divided it: weights tied late, say.

What is new is not trained, and DeepSpeed does not train it either. But a new module may hold parameters of the model,
which are divided, and must find them whole when it runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)


class LateArrivals:
    """Calls back when one of a model's modules is given another module or a parameter.

    torch tells of such for all modules of the process, which costs a look into a set for each.

    Args:
        known: the model's modules; the callback may add to it.
        on_module: called with the new module, which is in its place when the call has returned. A bound method,
            of which no reference is kept.
        on_parameter: called with the module that is given a parameter; likewise.
    """

    def __init__(
        self,
        known: weakref.WeakSet[nn.Module],
        on_module: Callable[[nn.Module], None],
        on_parameter: Callable[[nn.Module], None],
    ) -> None:
        tell_module, tell_parameter = weakref.WeakMethod(on_module), weakref.WeakMethod(on_parameter)

        def module_comes(parent: nn.Module, _: str, child: Any) -> None:
            if isinstance(child, nn.Module) and parent in known and (tell := tell_module()) is not None:
                tell(child)

        def parameter_comes(parent: nn.Module, _: str, param: Any) -> None:
            if param is not None and parent in known and (tell := tell_parameter()) is not None:
                tell(parent)

        self._handles = [
            register_module_module_registration_hook(module_comes),
            register_module_parameter_registration_hook(parameter_comes),
        ]
        for handle in self._handles:
            weakref.finalize(self, handle.remove)

    def stop(self) -> None:
        """Call back no more."""
        for handle in self._handles:
            handle.remove()
