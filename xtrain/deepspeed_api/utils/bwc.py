"""`deepspeed.utils.bwc`: what an mpu calls its tensor- and pipeline-parallel groups has changed over the years."""

from __future__ import annotations

from typing import Any

from xtrain.parallel.mpu import Answers

_TENSOR = "the ranks that a layer is divided over"


def bwc_tensor_model_parallel_rank(mpu: Any = None) -> int:
    """This process's rank in its tensor-parallel group; 0 without an mpu."""
    return 0 if mpu is None else int(Answers(mpu).ask("tensor", "rank", _TENSOR))


def bwc_tensor_model_parallel_world_size(mpu: Any = None) -> int:
    """Ranks in its tensor-parallel group; 1 without an mpu."""
    return 1 if mpu is None else int(Answers(mpu).ask("tensor", "world_size", _TENSOR))


def bwc_tensor_model_parallel_group(mpu: Any = None) -> Any:
    """Its tensor-parallel group; None without an mpu."""
    return None if mpu is None else Answers(mpu).ask("tensor", "group", _TENSOR)


def bwc_pipeline_parallel_world_size(mpu: Any = None) -> int:
    """Stages of the pipeline; 1 without an mpu, or with one that knows of no pipeline."""
    return 1 if mpu is None else Answers(mpu).size("pipeline")


def bwc_pipeline_parallel_group(mpu: Any = None) -> Any:
    """Its pipeline-parallel group; None without an mpu.

    Raises:
        ConfigError: the mpu has none.
    """
    return None if mpu is None else Answers(mpu).ask("pipeline", "group", "the stages of the pipeline")
