"""Host processors: host memory, gloo, float64 to float16."""

from __future__ import annotations

import torch

from xtrain.backends.backend import Backend, PrecisionFacet, ZeroFacet


class CpuPrecision(PrecisionFacet):
    """float64 costs the host little, and makes the norm independent of how
    the gradients are cut."""

    native_dtypes = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
    norm_dtype = torch.float64


class CpuZero(ZeroFacet):
    """The eight passes of an Adam update over 64 Ki elements stay in the processor's cache."""

    update_chunk = 65536


class CpuBackend(Backend):
    name = "cpu"
    precision = CpuPrecision()
    zero = CpuZero()
