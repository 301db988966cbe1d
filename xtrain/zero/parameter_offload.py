"""`engine.optimizer.parameter_offload`: the hooks of ZeRO stage 3 under DeepSpeed's names.

Libraries that generate with a model in training (TRL) gather all parameters, take the hooks off, so that no rank waits
for another one's forward pass, and put them on again afterwards. The hooks themselves are in model_hooks.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from xtrain.base.errors import ConfigError
from xtrain.zero.gather import Gatherer, Watcher


class _ExternalParameters:
    """`module.ds_external_parameters()`: what `register_external_parameter` announced, as (id, parameter)."""

    def __init__(self, module: nn.Module) -> None:
        self._module: weakref.ref[nn.Module] = weakref.ref(module)

    def __call__(self) -> Iterator[tuple[int, nn.Parameter]]:
        module = self._module()
        announced = () if module is None else module.__dict__.get("_xtrain_external", ())
        return iter([(id(param), param) for param in announced])

    def __deepcopy__(self, memo: dict[int, Any]) -> _ExternalParameters:
        """Of the copied module."""
        return _ExternalParameters(memo[id(self._module())])


class ParamCoordinator:
    """The recorded order of gathering, by which parameters are gathered ahead.

    Args:
        gatherer: None where no parameter is divided.
    """

    def __init__(self, gatherer: Gatherer | None) -> None:
        self._gatherer = gatherer

    def is_invalid_trace(self) -> bool:
        """Whether there is no recorded order: nothing is gathered ahead."""
        return self._gatherer is None or not self._gatherer.knows_order

    def is_complete_trace(self) -> bool:
        """Whether there is one."""
        return not self.is_invalid_trace()

    def is_record_trace(self) -> bool:
        """Whether the next iteration is recorded: always, where parameters are divided."""
        return self._gatherer is not None

    def _invalidate_trace(self) -> None:
        if self._gatherer is not None:
            self._gatherer.forget_order()


class ParameterOffload:
    """Takes the hooks of stage 3 off a model, and puts them on again.

    Args:
        module: the model.
        gatherer: of its param groups; None where all parameters are small enough to stay whole.

    Attributes:
        param_coordinator: the recorded order of gathering.
        backward_hooks: empty; those of backward lie on outputs, and are put there by `forward_hooks`.
    """

    def __init__(self, module: nn.Module, gatherer: Gatherer | None) -> None:
        self._module = weakref.ref(module)
        self.backward_hooks: list[Any] = []
        self._gatherer = gatherer
        self._unhooked: Watcher | None = None
        self.param_coordinator = ParamCoordinator(gatherer)
        for child in module.modules():
            child.ds_external_parameters = _ExternalParameters(child)  # type: ignore[assignment]

    @property
    def module(self) -> nn.Module:
        """The model.

        Raises:
            ConfigError: it is gone.
        """
        if (module := self._module()) is None:
            raise ConfigError("optimizer.parameter_offload.module: the model is gone")
        return module

    def get_param_coordinator(self) -> ParamCoordinator:
        """`param_coordinator`."""
        return self.param_coordinator

    @property
    def forward_hooks(self) -> list[Any]:
        """Handles of the hooks; each has `remove()`."""
        hooks = None if self._gatherer is None else self._gatherer.hooks
        if hooks is None:
            return []
        self._unhooked = hooks  # the hooks keep it alive, and may be about to be removed
        return hooks.handles

    @forward_hooks.setter
    def forward_hooks(self, handles: list[Any]) -> None:
        if self._gatherer is not None and self._gatherer.hooks is not None:
            self._gatherer.hooks.handles = list(handles)

    def _register_deepspeed_module(self, module: nn.Module, count: list[int] | None = None) -> None:
        """Put the hooks on again.

        Raises:
            ConfigError: `module` is not the whole model.
        """
        if module is not self.module:
            raise ConfigError(
                "_register_deepspeed_module() takes parameter_offload.module: hooks are put on the whole model"
            )
        if self._gatherer is not None and self._gatherer.hooks is not None:
            self._gatherer.hooks.put_back()
        self._unhooked = None

    def partition_all_parameters(self) -> None:
        """Divide again what is whole and not in use."""
        if self._gatherer is not None:
            self._gatherer.release_unused()

    empty_partition_cache = partition_all_parameters

    def destroy(self) -> None:
        """Take away the names that were put on the modules."""
        for child in self.module.modules():
            child.__dict__.pop("ds_external_parameters", None)
