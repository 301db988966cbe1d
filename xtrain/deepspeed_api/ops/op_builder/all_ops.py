"""`deepspeed.ops.op_builder.all_ops`: every operator by name."""

from xtrain.accelerator import get_accelerator
from xtrain.ops import op_builder
from xtrain.ops.op_builder.builder import OpBuilder

_CLASSES = [getattr(op_builder, name) for name in op_builder.__all__]
ALL_OPS: dict[str, OpBuilder] = {kind.NAME: kind() for kind in _CLASSES if kind.NAME != OpBuilder.NAME}
accelerator_name: str = get_accelerator().device_name()

__all__ = ["ALL_OPS", "accelerator_name"]
