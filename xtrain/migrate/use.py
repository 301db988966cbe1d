"""One place in somebody's repository that uses DeepSpeed, CUDA, apex or a library of CUDA's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ENGINE = "<engine>"
ACCELERATOR = "<accelerator>"
"""Roots of dotted names that no import gives: what `deepspeed.initialize` and `get_accelerator` return."""

DEEPSPEED_PACKAGES = ("deepspeed", "xtrain")
APEX_PACKAGES = ("apex", "amp_C", "apex_C")
CUDA_LIBRARIES = (
    "bitsandbytes", "cupy", "flash_attn", "flash_attn_interface", "flash_attn_2_cuda", "nvidia_smi",
    "pycuda", "pynvml", "transformer_engine", "triton", "xformers", "fused_layer_norm_cuda",
    "fused_weight_gradient_mlp_cuda", "scaled_masked_softmax_cuda", "scaled_softmax_cuda",
    "scaled_upper_triang_masked_softmax_cuda", "fused_dense_cuda", "syncbn",
)  # fmt: skip
"""Packages that need CUDA, or that xtrain does not stand for."""
THROUGH = ("accelerate", "fairscale", "lightning", "peft", "pytorch_lightning", "transformers", "trl")
"""Libraries that use DeepSpeed on their own; their names count where these say "deepspeed"."""
WORDS = ("(?i:deepspeed)", "xtrain", "apex", "amp_C", "cuda", "nccl", "cudnn", "NCCL_", "pin_memory", "cpp_extension",
         "torchrun", "accelerate launch", "distributed.launch", "distributed.run")  # fmt: skip
"""A Python file without any of these, and without a library's name, has no use."""
TORCH_CUDA = ("torch.cuda", "torch.backends.cuda", "torch.backends.cudnn", "torch.utils.cpp_extension")


@dataclass(frozen=True)
class Use:
    """One use.

    Attributes:
        file: path below what was scanned, with slashes.
        line: from 1; in a notebook, the line within its cell.
        kind: deepspeed, engine (attribute of what `initialize` returns), accelerator (of `get_accelerator()`),
            apex, cuda (torch.cuda, `.cuda()`, device strings, nccl), library (needs CUDA, or uses DeepSpeed
            itself), extension (CUDA sources and torch's builder of them), environment (variables), launch
            (command lines), config (a DeepSpeed configuration), unreadable (nothing could be read of it).
        name: the dotted name as the package itself has it, whatever the file calls it; `engine.backward`,
            `Tensor.cuda`, `"cuda:0"`, `CUDA_VISIBLE_DEVICES`, a command, or what is wrong with the file.
        optional: the file goes on without it: in a `try` that catches ImportError, or below a question whether
            it is available.
        cell: in a notebook, the number of the cell from 1.
        value: of a configuration, the dictionary; of a command line, the line.
        source: of a configuration in a file of its own, the file's text.
    """

    file: str
    line: int
    kind: str
    name: str
    optional: bool = False
    cell: int | None = None
    value: Any = field(default=None, compare=False, repr=False)
    source: str = field(default="", compare=False, repr=False)


def kind_of(name: str) -> str | None:
    """The kind of use that a dotted name is, or None when it is not one."""
    root, _, rest = name.partition(".")
    if root == ENGINE:
        return "engine" if rest else None
    if root == ACCELERATOR:
        return "accelerator" if rest else None
    if root in DEEPSPEED_PACKAGES:
        return "deepspeed"
    if root in APEX_PACKAGES:
        return "apex"
    if root in CUDA_LIBRARIES:
        return "library"
    if root in THROUGH:
        return "library" if "deepspeed" in rest.lower() else None
    for package in TORCH_CUDA:
        if name == package or name.startswith(f"{package}."):
            return "extension" if package.endswith("cpp_extension") else "cuda"
    return None
