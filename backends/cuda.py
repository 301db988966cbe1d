"""NVIDIA GPUs: torch.cuda and NCCL.

NCCL has streams of its own: a collective that is launched during backward waits for the gradients that were
queued before it and runs beside the rest, so the engine needs no stream of its own to overlap. The flat
buffers of stages 0 and 1 keep their addresses, which graphs that a script captures rely on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from xtrain.backends.backend import Backend, CollectivesFacet, PrecisionFacet, ZeroFacet
from xtrain.backends.device import DeviceRuntime


class CudaRuntime(DeviceRuntime):
    """torch.cuda, of a build for CUDA."""

    device_type = "cuda"
    visible_devices_variables = ("CUDA_VISIBLE_DEVICES",)

    def unavailable_reason(self) -> str | None:
        if torch.version.hip:
            return f"PyTorch {torch.__version__} is built for HIP, not for CUDA: use backend 'dcu'"
        if not torch.version.cuda:
            return f"PyTorch {torch.__version__} is built without CUDA: install a build of torch with CUDA"
        if not torch.cuda.is_available():
            return f"no CUDA device answers{self.describe_visible()}: `nvidia-smi` must list one"
        return None

    def device_name(self, index: int) -> str:
        return torch.cuda.get_device_name(index)

    def versions(self) -> dict[str, str]:
        cudnn = torch.backends.cudnn.version()
        return {"CUDA": str(torch.version.cuda), **({"cuDNN": str(cudnn)} if cudnn else {})}

    def set_deterministic(self, enabled: bool) -> None:
        if enabled:
            # cuBLAS reads it when it makes its first handle: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.backends.cudnn.benchmark = False
        super().set_deterministic(enabled)


class NcclCollectives(CollectivesFacet):
    """NCCL; under HIP the same name means RCCL."""

    process_group_backend = "nccl"


class CudaPrecision(PrecisionFacet):
    """bfloat16 from compute capability 8.0 (A100) on. Older chips train bf16 configs in float32.

    float32 products are what torch's own switches say (by default exact in matrix products, TF32 in cuDNN's
    convolutions), and exact in aligned mode.
    """

    norm_dtype = torch.float64

    def computes_bfloat16(self) -> bool:
        """Whether the current device has instructions for it."""
        return torch.cuda.get_device_capability() >= (8, 0)

    @property
    def native_dtypes(self) -> frozenset[torch.dtype]:
        always = frozenset({torch.float64, torch.float32, torch.float16})
        return always | {torch.bfloat16} if self.computes_bfloat16() else always

    @property
    def stand_ins(self) -> Mapping[torch.dtype, torch.dtype]:
        return {} if self.computes_bfloat16() else {torch.bfloat16: torch.float32}

    def exact_float32(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        # Sums of split products stay in float32 too.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


class CudaZero(ZeroFacet):
    """cudaMalloc aligns to 256 bytes, and cuBLAS chooses kernels by alignment up to that: parameters in a flat
    buffer get the kernels that they would get on their own."""

    alignment_bytes = 256
    update_chunk = 2**24
    """Bounds the temporaries of the norm (float64) and of the update to 128 MiB each."""


class CudaBackend(Backend):
    name = "cuda"
    runtime = CudaRuntime()
    collectives = NcclCollectives()
    precision = CudaPrecision()
    zero = CudaZero()
