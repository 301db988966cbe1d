"""Huawei Ascend NPUs: torch_npu and HCCL.

torch_npu is imported when this backend is asked whether it can be used, and only where it is installed.
Every name of it that is used here is looked up in tests/backends/torch_npu_names.json.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from importlib import metadata
from typing import Any

import torch

from xtrain.backends.backend import Backend, CollectivesFacet, PrecisionFacet, ZeroFacet
from xtrain.backends.device import DeviceRuntime


class AscendRuntime(DeviceRuntime):
    """torch.npu, which importing torch_npu makes."""

    device_type = "npu"
    visible_devices_variables = ("ASCEND_RT_VISIBLE_DEVICES",)

    def unavailable_reason(self) -> str | None:
        if importlib.util.find_spec("torch_npu") is None:
            return f"torch_npu is not installed: install the version that matches torch {torch.__version__}"
        try:
            torch_npu: Any = importlib.import_module("torch_npu")
        except Exception as error:  # missing CANN libraries, or a torch that does not match: many kinds
            first = next(iter(str(error).splitlines()), "")
            return (
                f"torch_npu does not import ({type(error).__name__}: {first}): source CANN's set_env.sh, and see that "
                "torch_npu and torch match"
            )
        if not torch_npu.npu.is_available():
            return f"no NPU answers{self.describe_visible()}: `npu-smi info` must list one"
        return None

    def versions(self) -> dict[str, str]:
        return {"torch_npu": metadata.version("torch_npu")}

    def set_deterministic(self, enabled: bool) -> None:
        if enabled:
            os.environ.setdefault("HCCL_DETERMINISTIC", "true")
        super().set_deterministic(enabled)


class HcclCollectives(CollectivesFacet):
    """HCCL. It adds int8 to int64, float16, float32 and (but for the first 910) bfloat16; not float64 or uint8,
    which it only moves."""

    process_group_backend = "hccl"


class AscendPrecision(PrecisionFacet):
    """float32 and float16, bfloat16 from the 910B on; float64 is not trained in.

    The first 910 (Atlas training series) saturates: an overflow gives the largest number, and a flag tells.
    float32 products are what torch_npu's own switches say (by default exact in matrix products, HF32 in
    convolutions), and exact in aligned mode.
    """

    @property
    def chip(self) -> Any:
        """The module torch_npu."""
        return importlib.import_module("torch_npu").npu

    @property
    def native_dtypes(self) -> frozenset[torch.dtype]:
        always = frozenset({torch.float32, torch.float16})
        return always | {torch.bfloat16} if self.chip.is_bf16_supported() else always

    @property
    def saturates(self) -> bool:
        return not self.chip.utils.is_support_inf_nan()

    def take_overflow(self) -> bool:
        overflowed = bool(self.chip.get_npu_overflow_flag())
        self.chip.clear_npu_overflow_flag()
        return overflowed

    def exact_float32(self) -> None:
        self.chip.matmul.allow_hf32 = False
        self.chip.conv.allow_hf32 = False


class AscendZero(ZeroFacet):
    """torch_npu's allocator gives memory in blocks of 512 bytes, and vector and transfer units work on aligned
    ones at full speed."""

    alignment_bytes = 512
    update_chunk = 2**24


class AscendBackend(Backend):
    name = "ascend"
    runtime = AscendRuntime()
    collectives = HcclCollectives()
    precision = AscendPrecision()
    zero = AscendZero()
