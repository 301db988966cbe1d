"""`torch.cuda`, `.cuda()`, `"cuda:0"` and `"nccl"` mean the selected backend. Nothing is active before `activate`.

On the host this is xtrain's own work; on Ascend it is torch_npu's, whose vendor keeps it up with its chip
(docs/decisions/0014-unchanged-scripts.md). On CUDA and DCU there is nothing to translate.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from xtrain.backends.backend import Backend
from xtrain.base.errors import BackendError
from xtrain.shims.patches import Patches

CHANGED = {
    "torch.utils.cpp_extension": "kernels.refuse_sources",
    "triton.runtime.jit": "kernels.refuse_triton",
    "lightning.fabric.accelerators.cuda": "lightning.accept_device",
    "lightning.fabric.strategies.deepspeed": "lightning.accept_index",
    "lightning.pytorch.accelerators.cuda": "lightning.accept_device",
    "lightning_fabric.accelerators.cuda": "lightning.accept_device",
    "lightning_fabric.strategies.deepspeed": "lightning.accept_index",
    "pytorch_lightning.accelerators.cuda": "lightning.accept_device",
}
"""Modules that are changed when a script imports them, by functions of the modules here."""


def is_needed(backend: Backend) -> bool:
    """Whether torch.cuda means something else than the backend."""
    return backend.runtime.device_type != "cuda"


def activate(backend: Backend, patches: Patches) -> None:
    """Translate from now on; `patches.undo()` ends it on the host.

    Raises:
        BackendError: the backend's kind of device is not known here.
    """
    if backend.runtime.host_memory:
        from xtrain.shims.device import host_names, libraries, meaning, tensors

        own = meaning.Device(backend.runtime.device_type)
        host_names.replace(patches, backend)
        tensors.replace(patches, own)
        libraries.replace(patches, own, backend.collectives.process_group_backend)
        meaning.replace(patches, own)
    elif backend.runtime.device_type == "npu":
        # At its import it replaces torch.cuda's names, and "nccl", for the whole process.
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
    else:
        raise BackendError(
            f"the device shim does not know backend {backend.name!r} (devices of type "
            f"{backend.runtime.device_type!r}): use --device-shim off and that backend's own names"
        )


def module_is_there(module: ModuleType, patches: Patches) -> None:
    """Change one of `CHANGED`, which has just been imported."""
    place, _, name = CHANGED[module.__name__].partition(".")
    getattr(importlib.import_module(f"{__name__}.{place}"), name)(module, patches)
