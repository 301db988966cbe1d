"""DeepSpeed's accelerator interface over one backend, for scripts that ask for the chip they run on.

Only a translation: what a device can do is asked of the backend's facets and of torch's module for the
device type (`torch.cuda`, `torch.npu`, `torch.cpu`); nothing in xtrain itself uses this.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch

from xtrain import comm
from xtrain.backends import Backend, registry
from xtrain.base.errors import ConfigError, NotImplementedYetError, unknown_name
from xtrain.deepspeed_engine.facade_memory import MemoryMethods

_NO_KERNELS = "xtrain compiles no kernels: take the optimizers from xtrain.ops"
_NO_GRAPHS = "use torch.compile, or the device's own graphs in torch"


def _computes(dtype: torch.dtype) -> Any:
    def answer(self: Accelerator) -> bool:
        return dtype in self.backend.precision.native_dtypes

    answer.__doc__ = f"Whether {str(dtype).removeprefix('torch.')} computes natively."
    return answer


def _tensor_class(name: str, dtype: torch.dtype) -> Any:
    def maker(self: Accelerator) -> Any:
        return (
            getattr(torch, name) if self._is_host else partial(torch.tensor, dtype=dtype, device=self._name)
        )

    return property(maker, doc=f"Makes {str(dtype).removeprefix('torch.')} tensors on the device.")


class Accelerator(MemoryMethods):
    """The methods of DeepSpeed's `get_accelerator()`; `device_index` None is the current device.

    Source: https://github.com/deepspeedai/DeepSpeed, accelerator/abstract_accelerator.py (0.19.8).

    Raises:
        NotImplementedYetError: by the methods that hand out op builders and device graphs.
    """

    supports_nvtx_domain = False

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._ranges: list[torch.profiler.record_function] = []
        self._compile_backend = "inductor"

    # ---------------------------------------------------------------- which device

    def is_available(self) -> bool:
        """Whether the backend can be used on this machine."""
        return self.backend.runtime.unavailable_reason() is None

    def device_name(self, device_index: int | None = None) -> str:
        """For example `cpu`, `cuda`, `cuda:1`."""
        return self._name if device_index is None else str(self.backend.runtime.device(device_index))

    def device(self, device_index: int | None = None) -> AbstractContextManager[Any]:
        """A context in which the device is the current one."""
        context = getattr(self._module, "device", None)
        return nullcontext() if context is None else context(device_index)

    def set_device(self, device_index: int) -> None:
        """Make the device the current one."""
        self._module.set_device(device_index)

    def current_device(self) -> int:
        """Index of the current device; on a host, this rank's number on it."""
        index = self._module.current_device()
        return index if isinstance(index, int) else comm.get_local_rank()

    def current_device_name(self) -> str:
        """`device_name` of the current device."""
        return self.device_name(self.current_device())

    def device_count(self) -> int:
        """Devices that this process sees; a host is one, or as many as LOCAL_SIZE says that ranks share it."""
        if self._module is torch.cpu and (ranks := os.environ.get("LOCAL_SIZE")):
            return int(ranks)
        return int(self._module.device_count())

    def communication_backend_name(self) -> str:
        """The library that moves bytes between ranks, as torch.distributed calls it."""
        return self.backend.collectives.process_group_backend

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lives on this kind of device."""
        return tensor.device.type == self._name

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        """Call at once, or when the device is initialised if its torch module can defer."""
        return getattr(self._module, "_lazy_call", lambda call: call())(callback)

    def visible_devices_envs(self) -> list[str]:
        """Environment variables that limit the devices a process sees; none on a host."""
        return list(self.backend.runtime.visible_devices_variables)

    def set_visible_devices_envs(self, current_env: dict[str, str], local_accelerator_ids: list[int]) -> None:
        """Limit a process that will be started with `current_env` to the given devices."""
        for variable in self.visible_devices_envs():
            current_env[variable] = ",".join(map(str, local_accelerator_ids))

    def export_envs(self) -> list[str]:
        """Variables that a launcher must hand over: none, xtrain's hands over the whole environment."""
        return []

    # ---------------------------------------------------------------- time

    def is_synchronized_device(self) -> bool:
        """Whether an operation is done when its call returns."""
        return self._is_host

    # Then the host's clock measures the work, streams need no events between, and allocations wait for nothing.
    use_host_timers = resolves_data_dependency = handles_memory_backpressure = is_synchronized_device

    def synchronize(self, device_index: int | None = None) -> None:
        """Wait for the device's work."""
        self._module.synchronize(device_index)

    @property
    def Stream(self) -> Any:
        """torch's class of streams for the device."""
        return self._module.Stream

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """A context whose work goes to `stream`."""
        return self._module.stream(stream)

    def current_stream(self, device_index: int | None = None) -> Any:
        """The stream that work goes to now."""
        return self._module.current_stream() if self._is_host else self._module.current_stream(device_index)

    def default_stream(self, device_index: int | None = None) -> Any:
        """The stream that work goes to when none was chosen."""
        default = getattr(self._module, "default_stream", None)
        return self.current_stream(device_index) if default is None else default(device_index)

    @property
    def Event(self) -> Any:
        """torch's class of events for the device."""
        return self._module.Event

    def range_push(self, msg: str, domain: str | None = None, category: str | None = None) -> None:
        """Open a named range that torch's profiler (and its NVTX emitter) shows."""
        block = torch.profiler.record_function(msg)
        block.__enter__()
        self._ranges.append(block)

    def range_pop(self, domain: str | None = None) -> None:
        """Close the range that was opened last.

        Raises:
            ConfigError: none is open.
        """
        if not self._ranges:
            raise ConfigError("range_pop() was called, but no range is open: call range_push(name) first")
        self._ranges.pop().__exit__(None, None, None)

    # ---------------------------------------------------------------- random numbers

    def random(self) -> ModuleType:
        """torch's module of random states."""
        return torch.random

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        """State of the device's default generator, uint8 on the host."""
        of_device = getattr(self._module, "get_rng_state", None)
        if device_index is None or of_device is None:
            return self.backend.runtime.get_rng_state()
        return of_device(device_index)

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        """Restore what `get_rng_state` returned."""
        of_device = getattr(self._module, "set_rng_state", None)
        if device_index is None or of_device is None:
            self.backend.runtime.set_rng_state(new_state)
        else:
            of_device(new_state, device_index)

    def manual_seed(self, seed: int) -> None:
        """Seed the current device's generator."""
        getattr(self._module, "manual_seed", torch.manual_seed)(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed the generators of all devices."""
        getattr(self._module, "manual_seed_all", torch.manual_seed)(seed)

    def initial_seed(self) -> int:
        """The seed of the current device's generator."""
        return int(getattr(self._module, "initial_seed", torch.initial_seed)())

    def default_generator(self, device_index: int) -> torch.Generator:
        """The generator behind the device's random functions."""
        of_devices = getattr(self._module, "default_generators", None)
        return torch.default_generator if of_devices is None else of_devices[device_index]

    # ---------------------------------------------------------------- numbers

    def supported_dtypes(self) -> list[torch.dtype]:
        """Dtypes that compute natively, widest first."""
        native = self.backend.precision.native_dtypes
        return sorted(native, key=lambda dtype: (-dtype.itemsize, str(dtype)))

    is_bf16_supported = _computes(torch.bfloat16)
    is_fp16_supported = _computes(torch.float16)
    is_fp64_supported = _computes(torch.float64)

    BFloat16Tensor = _tensor_class("BFloat16Tensor", torch.bfloat16)
    ByteTensor = _tensor_class("ByteTensor", torch.uint8)
    DoubleTensor = _tensor_class("DoubleTensor", torch.float64)
    FloatTensor = _tensor_class("FloatTensor", torch.float32)
    HalfTensor = _tensor_class("HalfTensor", torch.float16)
    IntTensor = _tensor_class("IntTensor", torch.int32)
    LongTensor = _tensor_class("LongTensor", torch.int64)

    # ---------------------------------------------------------------- compilers

    def get_compile_backend(self) -> str:
        """The backend for torch.compile that scripts should ask for."""
        return self._compile_backend

    def set_compile_backend(self, backend: str) -> None:
        """Change what `get_compile_backend` returns.

        Raises:
            ConfigError: torch has no such backend.
        """
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise ConfigError(unknown_name("torch.compile backend", backend, known))
        self._compile_backend = backend

    def is_triton_supported(self) -> bool:
        """Whether Triton's kernels run: never on a host, elsewhere when it is installed."""
        return not self._is_host and importlib.util.find_spec("triton") is not None

    def prefer_triton_grouped_mm(self) -> bool:
        """False: xtrain has no kernels of its own to prefer."""
        return False

    def is_current_stream_capturing(self) -> bool:
        """Whether a device graph is being captured."""
        return bool(getattr(self._module, "is_current_stream_capturing", lambda: False)())

    def create_graph(self) -> Any:
        raise NotImplementedYetError("get_accelerator().create_graph()", _NO_GRAPHS)

    def capture_to_graph(self, graph: Any, pool: Any = None, stream: Any = None) -> Any:
        raise NotImplementedYetError("get_accelerator().capture_to_graph()", _NO_GRAPHS)

    def replay_graph(self, graph: Any) -> Any:
        raise NotImplementedYetError("get_accelerator().replay_graph()", _NO_GRAPHS)

    def op_builder_dir(self) -> str:
        raise NotImplementedYetError("get_accelerator().op_builder_dir()", _NO_KERNELS)

    builder_classes: Callable[[str], Any] | None = None
    """Finds the class of an op builder by its name; set where DeepSpeed's names are (xtrain/accelerator)."""

    def get_op_builder(self, class_name: str) -> Any:
        """The class of an op builder, which tells whether there is a counterpart and compiles nothing.

        For an unknown name it is NotImplementedBuilder, as in DeepSpeed.
        """
        if Accelerator.builder_classes is None:
            raise NotImplementedYetError(f"the op builder {class_name}", _NO_KERNELS)
        return Accelerator.builder_classes(class_name)

    def create_op_builder(self, class_name: str) -> Any:
        """An op builder: see `get_op_builder`."""
        return self.get_op_builder(class_name)()

    def build_extension(self) -> Any:
        """torch's build command for extensions of your own."""
        from torch.utils.cpp_extension import BuildExtension

        return BuildExtension


@cache
def _of(backend: Backend) -> Accelerator:
    return Accelerator(backend)


def get_accelerator() -> Accelerator:
    """The accelerator of the backend that the environment chooses (XTRAIN_BACKEND, DS_ACCELERATOR) or that
    this machine has; the same object at each call.

    Raises:
        BackendError: the backend asked for cannot be used here.
    """
    return _of(registry.detect())


def is_current_accelerator_supported() -> bool:
    """True: `get_accelerator` returns what a backend supports, or raises."""
    return get_accelerator().is_available()
