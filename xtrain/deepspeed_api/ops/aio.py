"""`deepspeed.ops.aio`: the operator of asynchronous file access, which is not there; see its `load`."""

from xtrain.ops.op_builder import AsyncIOBuilder

__all__ = ["AsyncIOBuilder"]
