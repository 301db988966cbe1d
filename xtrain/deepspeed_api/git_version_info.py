"""`deepspeed.git_version_info`: which version this is, and what PyTorch was built with."""

from __future__ import annotations

import torch

from xtrain.ops.op_builder.all_ops import ALL_OPS, accelerator_name
from xtrain.version import __version__ as version

git_hash = git_branch = "[none]"
"""What DeepSpeed says when it was not built from a checkout: xtrain does not record its own."""
installed_ops = dict.fromkeys(ALL_OPS, False)
"""None is compiled at installation."""


def _two_numbers(text: str | None) -> str:
    return ".".join((text or "0.0").split("+")[0].split(".")[:2])


def _nccl_version() -> str:
    # torch knows it only where it was built with NCCL.
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "0.0"
    found = torch.cuda.nccl.version()
    return ".".join(map(str, found[:2]))


torch_info = {
    "version": _two_numbers(torch.__version__),
    "bf16_support": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    "cuda_version": _two_numbers(torch.version.cuda),
    "nccl_version": _nccl_version(),
    "hip_version": _two_numbers(torch.version.hip),
}
"""Versions as "major.minor"; "0.0" for what this build of PyTorch does not have."""

__all__ = [
    "accelerator_name",
    "git_branch",
    "git_hash",
    "installed_ops",
    "torch_info",
    "version",
]
