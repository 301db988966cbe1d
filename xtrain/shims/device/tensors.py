"""Functions that make tensors, and methods that move them, with words for CUDA devices, on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.jit import _builtins
from torch.utils._device import _device_constructors

from xtrain.shims.device.host_cuda import HostCuda
from xtrain.shims.device.meaning import Device, is_cuda, translated
from xtrain.shims.patches import Patches, asked_by_torch

_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")
_NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


def _with_device(function: Any, own: torch.device) -> Callable[..., Any]:
    """The function, with its `device` translated; page-locked memory is for transfers that do not happen."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = translated(kwargs["device"], own)
        if kwargs.get("pin_memory"):
            del kwargs["pin_memory"]
        if args and (type(args[-1]) is str or isinstance(args[-1], Device)):
            args = (*args[:-1], translated(args[-1], own))
        return function(*args, **kwargs)

    # TorchScript knows torch's functions by identity.
    operator = _builtins._find_builtin(function)
    if operator is not None:
        _builtins._register_builtin(wrapper, operator)
    return wrapper


def _factories(patches: Patches, own: torch.device) -> None:
    owners: dict[str, Any] = {
        "fft_fftfreq": torch.fft,
        "fft_rfftfreq": torch.fft,
        "nested_tensor": torch.nested,
    }
    for function in _device_constructors():
        name = function.__name__
        owner = owners.get(name, torch)
        name = name.removeprefix("fft_")
        if getattr(owner, name, None) is function:
            patches.set(owner, name, _with_device(function, own))
    for name in _LIKE:
        patches.set(torch, name, _with_device(getattr(torch, name), own))
    for name in _NEW:
        patches.set(torch.Tensor, name, _with_device(getattr(torch.Tensor, name), own))
    set_default_device = torch.set_default_device
    patches.set(torch, "set_default_device", lambda device: set_default_device(translated(device, own)))
    set_default_tensor_type = torch.set_default_tensor_type
    patches.set(torch, "set_default_tensor_type", lambda t: set_default_tensor_type(_host_type(t)))


def _host_type(kind: Any) -> Any:
    """`"torch.cuda.HalfTensor"` as the host's."""
    return kind.replace("torch.cuda.", "torch.") if isinstance(kind, str) else kind


def _from_outside(tensor: torch.Tensor) -> bool:
    """Whether somebody else has the memory too (NumPy, a file, another process): on CUDA a copy would be made."""
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and not tensor.untyped_storage().resizable()
        and not tensor.requires_grad
    )


def _copied(result: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`.cpu()` of a tensor on CUDA is a copy, which later steps do not change; so it is here."""
    return result.clone() if result is tensor else result


def _moves(patches: Patches, own: torch.device) -> None:
    to, cpu = torch.Tensor.to, torch.Tensor.cpu

    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        named = args[0] if args else kwargs.get("device")
        if type(named) is torch.dtype or isinstance(named, torch.Tensor) or named is None:
            return to(self, *args, **kwargs)
        if is_cuda(named):
            if args:
                args = (own, *args[1:])
            else:
                kwargs["device"] = own
            result = to(self, *args, **kwargs)
            return result.clone() if result is self and _from_outside(self) else result
        result = to(self, *args, **kwargs)
        is_own = str(named).partition(":")[0] == own.type
        # torch.device("cuda") is `own`, too: only the word itself says that the host is meant.
        return _copied(result, self) if is_own and type(named) is str and not asked_by_torch() else result

    def cuda(
        self: torch.Tensor,
        device: Any = None,
        non_blocking: bool = False,
        memory_format: Any = torch.preserve_format,
    ) -> torch.Tensor:
        result = to(self, own, non_blocking=non_blocking, memory_format=memory_format)
        return result.clone() if result is self and _from_outside(self) else result

    def on_host(self: torch.Tensor, memory_format: Any = torch.preserve_format) -> torch.Tensor:
        result = cpu(self, memory_format=memory_format)
        return result if asked_by_torch() else _copied(result, self)

    module_to = torch.nn.Module.to

    def module_moved(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        if args:
            args = (translated(args[0], own), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = translated(kwargs["device"], own)
        return module_to(self, *args, **kwargs)

    patches.set(torch.nn.Module, "to", functools.wraps(module_to)(module_moved))
    patches.set(torch.Tensor, "to", functools.wraps(to)(moved))
    patches.set(torch.Tensor, "cuda", functools.wraps(torch.Tensor.cuda)(cuda))
    patches.set(torch.Tensor, "cpu", functools.wraps(cpu)(on_host))
    for storage in (torch.UntypedStorage, torch.TypedStorage):
        patches.set(storage, "cuda", lambda self, device=None, non_blocking=False: self)


def _answers(patches: Patches) -> None:
    """What a tensor says of itself. torch's own code gets the true answers."""
    kind, get_device, is_there = torch.Tensor.type, torch.Tensor.get_device, torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]

    def type_of(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        if dtype is not None:
            return kind(self, _host_type(dtype), non_blocking=non_blocking, **kwargs)
        name = kind(self)
        return (
            name
            if asked_by_torch() or self.device.type != "cpu"
            else name.replace("torch.", "torch.cuda.", 1)
        )

    def number(self: torch.Tensor) -> int:
        return get_device(self) if asked_by_torch() or self.device.type != "cpu" else HostCuda.current

    def is_on_device(self: torch.Tensor) -> bool:
        return is_there(self) or (self.device.type == "cpu" and not asked_by_torch())

    patches.set(torch.Tensor, "type", functools.wraps(kind)(type_of))
    patches.set(torch.Tensor, "get_device", functools.wraps(get_device)(number))
    patches.set(torch.Tensor, "is_cuda", property(is_on_device))
    patches.set(torch.Tensor, "pin_memory", lambda self, device=None: self)
    patches.set(torch.Tensor, "record_stream", lambda self, stream: None)


def _files(patches: Patches, own: torch.device) -> None:
    load = torch.load

    @functools.wraps(load)
    def loaded(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if map_location is None:

            def place(storage: Any, location: str) -> Any:
                return storage if is_cuda(location) else None

            map_location = place
        elif isinstance(map_location, dict):
            map_location = {key: translated(value, own) for key, value in map_location.items()}
            map_location = {**{f"cuda:{index}": own for index in range(64)}, **map_location}
        else:
            map_location = translated(map_location, own)
        return load(f, map_location, *args, **kwargs)

    patches.set(torch, "load", loaded)


def replace(patches: Patches, own: torch.device) -> None:
    """Tensors understand the words."""
    _factories(patches, own)
    _moves(patches, own)
    _answers(patches)
    _files(patches, own)
