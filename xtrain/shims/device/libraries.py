"""Parts of torch that take a device's or a library's name: mixed precision, torch.distributed, DDP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import device_mesh
from torch.nn.parallel import DistributedDataParallel

from xtrain.shims.device.meaning import is_cuda
from xtrain.shims.patches import Patches, asked_by_torch


def _first_translated(
    function: Callable[..., Any], own: torch.device, keyword: str, at: int
) -> Callable[..., Any]:
    """The function, with a device type (a string) translated that is its argument number `at`, or `keyword`."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if len(args) > at:
            args = (*args[:at], _type(args[at], own), *args[at + 1 :])
        elif keyword in kwargs:
            kwargs[keyword] = _type(kwargs[keyword], own)
        return function(*args, **kwargs)

    return wrapper


def _type(kind: Any, own: torch.device) -> Any:
    return own.type if isinstance(kind, str) and is_cuda(kind) else kind


def _precision(patches: Patches, own: torch.device) -> None:
    start = torch.amp.autocast.__init__

    @functools.wraps(start)
    def __init__(self: Any, device_type: str, dtype: Any = None, *args: Any, **kwargs: Any) -> None:
        if _type(device_type, own) != device_type and dtype is None:
            dtype = torch.get_autocast_dtype("cuda")  # float16 unless the script has set another
        start(self, _type(device_type, own), dtype, *args, **kwargs)

    patches.set(torch.amp.autocast, "__init__", __init__)
    patches.set(torch.amp.GradScaler, "__init__", _scaler(torch.amp.GradScaler.__init__, own))
    for name in ("custom_fwd", "custom_bwd"):
        function = _first_translated(getattr(torch.amp, name), own, "device_type", 1)
        patches.set(torch.amp, name, function)
        patches.set(torch.cuda.amp, name, functools.partial(function, device_type=own.type))
    enabled = torch.is_autocast_enabled
    patches.set(
        torch,
        "is_autocast_enabled",
        lambda *kind: enabled(*kind) if kind or asked_by_torch() else enabled(own.type),
    )
    patches.set(torch, "get_autocast_gpu_dtype", lambda: torch.get_autocast_dtype(own.type))


def _scaler(start: Callable[..., Any], own: torch.device) -> Callable[..., Any]:
    @functools.wraps(start)
    def __init__(self: Any, device: str = "cuda", *args: Any, **kwargs: Any) -> None:
        start(self, _type(device, own), *args, **kwargs)

    return __init__


def _library(named: Any, own: str) -> Any:
    """The backend's library for "nccl", alone or in torch's list of libraries by device type."""
    if not isinstance(named, str) or "nccl" not in named.lower():
        return named
    return own


def _collectives(patches: Patches, own: torch.device, library: str) -> None:
    init, new_group, barrier = dist.init_process_group, dist.new_group, dist.barrier

    @functools.wraps(init)
    def started(backend: Any = None, *args: Any, device_id: Any = None, **kwargs: Any) -> Any:
        return init(_library(backend, library), *args, **kwargs)

    @functools.wraps(new_group)
    def grouped(
        ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        kwargs.pop("device_id", None)
        return new_group(ranks, timeout, _library(backend, library), *args, **kwargs)

    @functools.wraps(barrier)
    def waited(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return barrier(group, async_op)

    meshed = _first_translated(device_mesh.init_device_mesh, own, "device_type", 0)
    new = {"init_process_group": started, "new_group": grouped, "barrier": waited, "init_device_mesh": meshed}
    nccl = dist.is_nccl_available
    new["is_nccl_available"] = lambda: nccl() or not asked_by_torch()
    for module in (dist, dist.distributed_c10d, device_mesh):
        for name, function in new.items():
            if name in vars(module):
                patches.set(module, name, function)
    mesh = device_mesh.DeviceMesh.__init__
    patches.set(device_mesh.DeviceMesh, "__init__", _first_translated(mesh, own, "device_type", 1))


def _ddp(patches: Patches) -> None:
    start = DistributedDataParallel.__init__

    @functools.wraps(start)
    def __init__(
        self: Any, module: Any, device_ids: Any = None, output_device: Any = None, *args: Any, **kw: Any
    ) -> None:
        start(self, module, None, None, *args, **kw)

    patches.set(DistributedDataParallel, "__init__", __init__)


def replace(patches: Patches, own: torch.device, library: str) -> None:
    """These parts understand the words, and "nccl"."""
    _precision(patches, own)
    _collectives(patches, own, library)
    _ddp(patches)
    fork = torch.random.fork_rng
    patches.set(torch.random, "fork_rng", lambda devices=None, *args, **kwargs: fork([], *args, **kwargs))
