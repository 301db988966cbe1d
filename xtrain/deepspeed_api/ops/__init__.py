"""DeepSpeed's names for optimizers: `xtrain.ops.adam.FusedAdam` and so on."""

from typing import Any

from xtrain.deepspeed_api.compat import packages

_find = packages.attributes(__name__)


def __getattr__(name: str) -> Any:
    if name != "__compatible_ops__":
        return _find(name)
    from xtrain.ops.op_builder.all_ops import ALL_OPS
    from xtrain.ops.op_builder.builder import OpBuilder

    # Kept, as in DeepSpeed, so that a script may change an entry.
    answers = {op: builder.is_compatible() for op, builder in ALL_OPS.items()}
    globals()[name] = {**answers, OpBuilder.NAME: False}
    return globals()[name]
