"""Hygon DCU, and AMD GPUs: PyTorch built for HIP (ROCm, or Hygon's DTK), which calls itself torch.cuda.

Devices are of type "cuda" and RCCL is called "nccl"; what tells the builds apart is torch.version.hip.
torch.cuda.is_bf16_supported() is True on every such chip, because conversions count: the architecture is
asked here instead.
"""

from __future__ import annotations

import torch

from xtrain.backends.backend import Backend
from xtrain.backends.cuda import CudaPrecision, CudaRuntime, CudaZero, NcclCollectives

BFLOAT16_ARCHITECTURES = (
    # AMD: CDNA (gfx908 on), RDNA 3 (gfx11) on.
    *("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12"),
    # Hygon: K100-AI (gfx928) and later have bf16 matrix instructions; Z100 and Z100L (gfx906) and K100 (gfx926) not.
    *("gfx928", "gfx92a", "gfx936", "gfx938", "gfx946"),
)
"""Prefixes of architectures with bfloat16 instructions. One that is not listed is not believed to have them."""


class DcuRuntime(CudaRuntime):
    """torch.cuda, of a build for HIP."""

    visible_devices_variables = ("HIP_VISIBLE_DEVICES",)

    def unavailable_reason(self) -> str | None:
        if not torch.version.hip:
            return f"PyTorch {torch.__version__} is not built for HIP: install the torch of your DTK or ROCm version"
        if not torch.cuda.is_available():
            return f"no DCU answers{self.describe_visible()}: `rocm-smi` (DTK: `hy-smi`) must list one"
        return None

    def versions(self) -> dict[str, str]:
        return {"HIP": str(torch.version.hip)}


class DcuPrecision(CudaPrecision):
    """Chips without bfloat16 (gfx906, as in Z100) train bf16 configs in float32, and say so; an fp16 config
    computes in fp16 there."""

    def architecture(self) -> str:
        """For example gfx906, of the current device."""
        name: str = torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName
        return name.split(":")[0]

    def computes_bfloat16(self) -> bool:
        return self.architecture().startswith(BFLOAT16_ARCHITECTURES)


class DcuBackend(Backend):
    name = "dcu"
    runtime = DcuRuntime()
    collectives = NcclCollectives()
    precision = DcuPrecision()
    zero = CudaZero()
