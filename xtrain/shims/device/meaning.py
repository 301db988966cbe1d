"""Words for CUDA devices, where memory is the host's: `"cuda"`, `"cuda:1"`, `torch.device("cuda")`, 0."""

from __future__ import annotations

import copyreg
from typing import Any

import torch

from xtrain.shims.patches import Patches

Device = torch.device
"""torch's own class; while the shim is active `torch.device` is another."""


def is_cuda(device: Any) -> bool:
    """Whether this is a word for a CUDA device. A number is one: that is what torch takes it for."""
    if type(device) is str:
        return device == "cuda" or device.startswith("cuda:")
    if isinstance(device, Device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def translated(device: Any, own: torch.device) -> Any:
    """`own` for a word for a CUDA device, else what was given."""
    return own if is_cuda(device) else device


class _Answers(type):
    """`isinstance(x, torch.device)` goes on being about torch's own class, and so do tables with it as a key."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is Device

    def __hash__(cls) -> int:
        return hash(Device)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Device)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, Device)


def _device_class(own: torch.device) -> type:
    class device(metaclass=_Answers):
        """torch.device, whose CUDA devices are the selected backend's. Makes torch's own objects."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            named = args[0] if args else kwargs.get("type", kwargs.get("device"))
            return own if is_cuda(named) else Device(*args, **kwargs)

    device.__module__, device.__qualname__ = "torch", "device"
    return device


def _pickled(device: torch.device) -> tuple[Any, ...]:
    # pickle finds a class by its name, and under this name is the shim's now; either makes the same object.
    return torch.device, (device.type, *([] if device.index is None else [device.index]))


def replace(patches: Patches, own: torch.device) -> None:
    """`torch.device` and `torch.Generator` understand the words."""
    patches.set(torch, "device", _device_class(own))
    copyreg.pickle(Device, _pickled)
    real = torch.Generator

    class Generator(real):  # type: ignore[misc, valid-type]
        """torch.Generator, whose CUDA generators are the selected backend's."""

        def __new__(cls, device: Any = "cpu") -> Any:
            return real(translated(device, own))

    Generator.__module__, Generator.__qualname__ = "torch", "Generator"
    patches.set(torch, "Generator", Generator)
