"""The runtime of accelerators whose torch module answers as torch.cuda does; cuda, dcu and ascend share it.

`self.chip` is that module. tests/backends/test_names.py looks up every name that is taken from it here.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from xtrain.backends.backend import MemoryStatistics, RuntimeFacet
from xtrain.base.errors import BackendError


class DeviceRuntime(RuntimeFacet):
    """Devices with numbers, one for each rank of a host."""

    @property
    def chip(self) -> Any:
        """torch's module for the device type: torch.cuda, torch.npu."""
        return torch.get_device_module(self.device_type)

    def device_count(self) -> int:
        return int(self.chip.device_count())

    def describe_visible(self) -> str:
        """The variables that limit what the process sees, for messages; empty when none is set."""
        shown = [
            f"{name}={os.environ[name]!r}" for name in self.visible_devices_variables if name in os.environ
        ]
        return f" ({', '.join(shown)})" if shown else ""

    def device(self, local_rank: int) -> torch.device:
        count = self.device_count()
        if local_rank >= count:
            raise BackendError(
                f"local rank {local_rank} has no device of its own: this process sees {count} of type "
                f"{self.device_type!r}{self.describe_visible()}; start at most {count} ranks on this host, or let each "
                "rank see all devices"
            )
        return torch.device(self.device_type, local_rank)

    def device_name(self, index: int) -> str:
        return f"{self.device_type}:{index}"

    def set_device(self, local_rank: int) -> None:
        self.chip.set_device(self.device(local_rank))

    def synchronize(self) -> None:
        self.chip.synchronize()

    def memory(self) -> MemoryStatistics:
        free, total = self.chip.mem_get_info()
        return MemoryStatistics(
            allocated=self.chip.memory_allocated(),
            peak_allocated=self.chip.max_memory_allocated(),
            reserved=self.chip.memory_reserved(),
            peak_reserved=self.chip.max_memory_reserved(),
            free=int(free),
            total=int(total),
        )

    def reset_peak_memory(self) -> None:
        self.chip.reset_peak_memory_stats()

    def pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory()

    def get_rng_state(self) -> torch.Tensor:
        state: torch.Tensor = self.chip.get_rng_state()
        return state

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.chip.set_rng_state(state)
