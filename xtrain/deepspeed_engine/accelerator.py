"""A backend as DeepSpeed's accelerator: what DeepSpeed's engine asks of the chip, answered by the facets.

The facade of xtrain.accelerator has DeepSpeed's names already. What it lacks for want of kernels (op builders,
device graphs) is DeepSpeed's own for the type of device.
"""

from __future__ import annotations

import importlib
import os
import types
from functools import cached_property
from types import ModuleType
from typing import Any

from xtrain.backends import Backend
from xtrain.base.errors import BackendError, NotImplementedYetError
from xtrain.deepspeed_engine.facade import Accelerator
from xtrain.shims import alias

EXTRA = "pip install 'xtrain[deepspeed]'"
_CHOICE = "DS_ACCELERATOR"


def import_deepspeed(device_type: str) -> ModuleType:
    """The installed DeepSpeed.

    Its import chooses an accelerator of its own before one can be set. DS_ACCELERATOR may hold the name of one of
    our backends, which it would refuse: while it is imported, the variable says the device type if it knows that.

    Raises:
        BackendError: it is not installed, or its import fails.
    """
    given = os.environ.get(_CHOICE)
    os.environ[_CHOICE] = device_type if device_type in ("cpu", "cuda", "npu") else "cpu"
    try:
        found = importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise BackendError(f"the installed deepspeed cannot be imported: {error}") from error
        raise BackendError(
            f"config key 'xtrain.engine' is 'deepspeed', and deepspeed is not installed: {EXTRA}, or leave the key out"
        ) from None
    except Exception as error:  # its import runs probes of compilers and devices
        raise BackendError(f"the installed deepspeed cannot be imported: {error}") from error
    finally:
        if given is None:
            del os.environ[_CHOICE]
        else:
            os.environ[_CHOICE] = given
    if alias.is_ours(found):
        raise BackendError(
            "config key 'xtrain.engine' is 'deepspeed', and `xtrain run`, xtrain.install() or xtrain.as_deepspeed "
            "hides the installed deepspeed: leave one of them out"
        )
    return found


class BackendAccelerator(Accelerator):
    """The facade with DeepSpeed's kernels. `present` makes an instance that DeepSpeed takes."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._communication_backend_name = backend.collectives.process_group_backend

    @cached_property
    def _theirs(self) -> Any:
        """DeepSpeed's own accelerator of this device type, or None when it has none."""
        name = f"deepspeed.accelerator.{self._name}_accelerator"
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name:
                return None
            raise
        return getattr(module, f"{self._name.upper()}_Accelerator")()

    def _ask(self, method: str, *args: Any) -> Any:
        if self._theirs is None:
            raise NotImplementedYetError(
                f"DeepSpeed's {method}() for devices of type {self._name!r}",
                "leave out what needs DeepSpeed's kernels (fused optimizers, offload)",
            )
        return getattr(self._theirs, method)(*args)

    def create_graph(self) -> Any:
        """A device graph; None on a host."""
        return self._ask("create_graph")

    def capture_to_graph(self, graph: Any, pool: Any = None, stream: Any = None) -> Any:
        """A context whose work is captured."""
        return self._ask("capture_to_graph", graph, pool, stream)

    def replay_graph(self, graph: Any) -> Any:
        """Run what was captured."""
        return self._ask("replay_graph", graph)

    def op_builder_dir(self) -> str:
        """Package of DeepSpeed's op builders for the device; the host's for devices it does not know."""
        return "deepspeed.ops.op_builder.cpu" if self._theirs is None else self._ask("op_builder_dir")

    def create_op_builder(self, class_name: str) -> Any:
        """A builder of one of DeepSpeed's kernels.

        None for the host's shared-memory collective, which DeepSpeed would compile for minutes at the start of each
        first run; the process group of the backend does its work.
        """
        return None if class_name == "ShareMemCommBuilder" else self._ask("create_op_builder", class_name)

    def get_op_builder(self, class_name: str) -> Any:
        """The class of a builder."""
        return self._ask("get_op_builder", class_name)


def present(backend: Backend, deepspeed: ModuleType) -> BackendAccelerator:
    """Make `backend` the accelerator of the imported DeepSpeed, and return what it now asks.

    Raises:
        BackendError: the installed version asks something that has no answer here.
    """
    base = deepspeed.accelerator.DeepSpeedAccelerator
    kind = types.new_class("XtrainAccelerator", (BackendAccelerator, base))
    unanswered = sorted(getattr(kind, "__abstractmethods__", ()))
    if unanswered:
        raise BackendError(
            f"deepspeed {deepspeed.__version__} asks its accelerator for {', '.join(unanswered)}, which this xtrain "
            "does not answer: install a version that constraints.txt names"
        )
    accelerator: BackendAccelerator = kind(backend)
    deepspeed.accelerator.set_accelerator(accelerator)
    return accelerator
