"""`deepspeed.accelerator`: the chip under DeepSpeed's method names, answered by the backend's facets."""

from typing import Any

from xtrain.deepspeed_engine.facade import Accelerator, get_accelerator, is_current_accelerator_supported

DeepSpeedAccelerator = Accelerator


def _builder_class(name: str) -> Any:
    from xtrain.ops import op_builder

    known = name in op_builder.__all__
    return getattr(op_builder, name) if known else op_builder.NotImplementedBuilder


Accelerator.builder_classes = staticmethod(_builder_class)

__all__ = ["Accelerator", "DeepSpeedAccelerator", "get_accelerator", "is_current_accelerator_supported"]
