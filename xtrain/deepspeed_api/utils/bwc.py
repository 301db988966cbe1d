"""`deepspeed.utils.bwc`: what an mpu calls its tensor- and pipeline-parallel groups has changed over the years."""

from __future__ import annotations

from typing import Any

from xtrain.base.errors import ConfigError


def _ask(mpu: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        if hasattr(mpu, name):
            return getattr(mpu, name)()
    raise ConfigError(f"the mpu has none of the methods {', '.join(names)}")


def _tensor_parallel(mpu: Any, what: str, alone: Any) -> Any:
    if mpu is None:
        return alone
    kinds = ("tensor_model_parallel", "slice_parallel", "model_parallel")
    return _ask(mpu, tuple(f"get_{kind}_{what}" for kind in kinds))


def _pipeline_parallel(mpu: Any, what: str) -> Any:
    return _ask(mpu, (f"get_pipeline_model_parallel_{what}", f"get_pipe_parallel_{what}"))


def bwc_tensor_model_parallel_rank(mpu: Any = None) -> int:
    """This process's rank in its tensor-parallel group; 0 without an mpu."""
    return int(_tensor_parallel(mpu, "rank", 0))


def bwc_tensor_model_parallel_world_size(mpu: Any = None) -> int:
    """Ranks in its tensor-parallel group; 1 without an mpu."""
    return int(_tensor_parallel(mpu, "world_size", 1))


def bwc_tensor_model_parallel_group(mpu: Any = None) -> Any:
    """Its tensor-parallel group; None without an mpu."""
    return _tensor_parallel(mpu, "group", None)


def bwc_pipeline_parallel_world_size(mpu: Any = None) -> int:
    """Stages of the pipeline; 1 without an mpu, or with one that knows of no pipeline."""
    try:
        return 1 if mpu is None else int(_pipeline_parallel(mpu, "world_size"))
    except ConfigError:
        return 1


def bwc_pipeline_parallel_group(mpu: Any = None) -> Any:
    """Its pipeline-parallel group; None without an mpu.

    Raises:
        ConfigError: the mpu has none.
    """
    return None if mpu is None else _pipeline_parallel(mpu, "group")
