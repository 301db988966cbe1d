"""Lightning and Fabric: their GPU strategies look at a device's type and index, which are the backend's here."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from xtrain.shims.patches import Patches


def accept_device(cuda: ModuleType, patches: Patches) -> None:
    """accelerators.cuda: `torch.device("cuda", 1)` has another type here, and is refused for it."""

    def setup_device(self: Any, device: torch.device) -> None:
        torch.cuda.set_device(device)

    patches.set(cuda.CUDAAccelerator, "setup_device", setup_device)


def accept_index(strategy: ModuleType, patches: Patches) -> None:
    """strategies.deepspeed: the device of each rank must have the rank's own index, and a host's memory has none."""
    validate = strategy._validate_device_index_selection

    def checked(parallel_devices: list[torch.device]) -> None:
        if any(device.index is not None for device in parallel_devices):
            validate(parallel_devices)

    patches.set(strategy, "_validate_device_index_selection", checked)
