"""The functions of torch.cuda on the host. Each is what its namesake says, about host memory and torch's own generator.

Names that are not here are in names.py: kept as they are, or refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch

from xtrain.backends.backend import Backend
from xtrain.base.errors import BackendError
from xtrain.shims.device import streams
from xtrain.shims.patches import asked_by_torch


def visible_devices() -> int:
    """How many devices there are: what CUDA_VISIBLE_DEVICES lists, else one for each rank of this host.

    Any number of ranks share a host; the count is what scripts divide ranks by.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        entries = [entry.strip() for entry in listed.split(",")]
        # As CUDA: what follows the first number that is none does not count.
        return next((at for at, entry in enumerate(entries) if entry in ("", "-1")), len(entries))
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


@dataclass(frozen=True)
class Properties:
    """What torch.cuda.get_device_properties returns. No kernels for NVIDIA's chips run here: the capability is 0.0."""

    name: str
    total_memory: int
    multi_processor_count: int
    major: int = 0
    minor: int = 0
    warp_size: int = 1
    gcnArchName: str = ""
    is_integrated: int = 1
    is_multi_gpu_board: int = 0


class device:
    """torch.cuda.device(index): a context in which it is the current one. None or -1 changes nothing."""

    def __init__(self, device: Any) -> None:
        self.idx = _index(device, -1)
        self.prev_idx = -1

    def __enter__(self) -> None:
        self.prev_idx = HostCuda.current
        if self.idx >= 0:
            HostCuda.current = self.idx

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        HostCuda.current = self.prev_idx


class device_of(device):
    """torch.cuda.device_of(tensor): nothing changes, all tensors are on the current one."""

    def __init__(self, obj: Any) -> None:
        super().__init__(None)


def _index(device: Any, none: int) -> int:
    """The number in a word for a device."""
    if isinstance(device, str):
        device = int(device.partition(":")[2] or none)
    number = getattr(device, "index", device)
    return none if number is None else int(number)


class _SameGenerator:
    """torch.cuda.default_generators: whatever the number, this process has one."""

    def __len__(self) -> int:
        return visible_devices()

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


class HostCuda:
    """One method for each function of torch.cuda; the names that start with `_` are those that scripts use too."""

    current = 0
    Event, Stream, StreamContext = streams.Event, streams.Stream, streams.OnStream
    stream = streams.OnStream
    device, device_of = device, device_of
    default_generators = _SameGenerator()

    def __init__(self, backend: Backend) -> None:
        self._runtime, self._native = backend.runtime, backend.precision.native_dtypes
        self._truth = torch.cuda.is_available()

    # ---------------------------------------------------------------- which device

    def is_available(self) -> bool:
        return self._truth if asked_by_torch() else visible_devices() > 0

    def device_count(self) -> int:
        return 0 if asked_by_torch() and not self._truth else visible_devices()

    def is_initialized(self) -> bool:
        return not asked_by_torch()

    def init(self) -> None:
        """Nothing to start."""

    _lazy_init = init

    def _lazy_call(self, callable: Callable[[], Any], **kwargs: Any) -> None:
        callable()

    def current_device(self) -> int:
        return HostCuda.current

    def set_device(self, device: Any) -> None:
        index = _index(device, HostCuda.current)
        if index < 0:
            raise BackendError(f"torch.cuda.set_device({device!r}): a device's number is 0 or more")
        HostCuda.current = index

    def get_device_name(self, device: Any = None) -> str:
        return self._runtime.device_name(_index(device, HostCuda.current))

    def get_device_properties(self, device: Any = None) -> Properties:
        return Properties(self.get_device_name(device), self._runtime.memory().total, os.cpu_count() or 1)

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        """(0, 0): every test for a generation of NVIDIA's chips says no."""
        return (0, 0)

    def get_arch_list(self) -> list[str]:
        return []

    def get_gencode_flags(self) -> str:
        return ""

    def can_device_access_peer(self, device: Any, peer_device: Any) -> bool:
        return True

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return torch.bfloat16 in self._native

    def is_tf32_supported(self) -> bool:
        return False

    # ---------------------------------------------------------------- time

    def synchronize(self, device: Any = None) -> None:
        """Everything is done."""

    ipc_collect = synchronize

    def current_stream(self, device: Any = None) -> streams.Stream:
        return streams.OnStream.current

    def default_stream(self, device: Any = None) -> streams.Stream:
        return streams.OnStream.default

    def set_stream(self, stream: streams.Stream | None) -> None:
        streams.OnStream.current = stream or streams.OnStream.current

    def is_current_stream_capturing(self) -> bool:
        return False

    def get_sync_debug_mode(self) -> int:
        return 0

    # ---------------------------------------------------------------- memory

    def memory_allocated(self, device: Any = None) -> int:
        return self._runtime.memory().allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return self._runtime.memory().peak_allocated

    def memory_reserved(self, device: Any = None) -> int:
        return self._runtime.memory().reserved

    def max_memory_reserved(self, device: Any = None) -> int:
        return self._runtime.memory().peak_reserved

    memory_cached, max_memory_cached = memory_reserved, max_memory_reserved

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        found = self._runtime.memory()
        return found.free, found.total

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        found = self._runtime.memory()
        return {
            "allocated_bytes.all.current": found.allocated,
            "allocated_bytes.all.peak": found.peak_allocated,
            "reserved_bytes.all.current": found.reserved,
            "reserved_bytes.all.peak": found.peak_reserved,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def memory_summary(self, device: Any = None, abbreviated: bool = False) -> str:
        found = asdict(self._runtime.memory())
        return "\n".join(
            f"{name.replace('_', ' '):16}{size / 2**20:12.1f} MiB" for name, size in found.items()
        )

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self._runtime.reset_peak_memory()

    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats

    def empty_cache(self) -> None:
        """torch caches no host memory."""

    # ---------------------------------------------------------------- random numbers

    def get_rng_state(self, device: Any = "cuda") -> torch.Tensor:
        return self._runtime.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device: Any = "cuda") -> None:
        self._runtime.set_rng_state(new_state)

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [self._runtime.get_rng_state() for _ in range(visible_devices())]

    def set_rng_state_all(self, new_states: Iterable[torch.Tensor]) -> None:
        states = list(new_states)
        self._runtime.set_rng_state(states[min(HostCuda.current, len(states) - 1)])

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    manual_seed_all = manual_seed

    def seed(self) -> None:
        torch.default_generator.seed()

    seed_all = seed

    def initial_seed(self) -> int:
        return torch.default_generator.initial_seed()
