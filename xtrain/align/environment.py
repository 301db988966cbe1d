"""What a record's header says about where the run took place: versions, processor, switches that change numbers."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from xtrain.base.run_folder import PERTURB_VARIABLE

VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MKL_CBWR",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "HCCL_DETERMINISTIC",
    "HCCL_ALGO",
    "LCCL_DETERMINISTIC",
    "PYTORCH_CUDA_ALLOC_CONF",
    "XTRAIN_BACKEND",
    PERTURB_VARIABLE,
    "DS_ACCELERATOR",
)
"""Environment variables that go into the header: those that change what is computed, and nothing private."""


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "cpu model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def describe(device: torch.device | str) -> dict[str, Any]:
    """The environment as it is now."""
    place = torch.device(device)
    found: dict[str, Any] = {
        "processor": _processor(),
        "device": place.type,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    name = getattr(getattr(torch, place.type, None), "get_device_name", None)
    if name is not None:
        found["device_name"] = name(place)
    for library in ("cuda", "hip"):
        if version := getattr(torch.version, library, None):
            found[library] = version
    return found
