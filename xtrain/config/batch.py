"""The batch-size identity: train_batch = micro_batch x gradient_accumulation x data-parallel ranks."""

from __future__ import annotations

from typing import NamedTuple

from xtrain.base.errors import ConfigError


class BatchSizes(NamedTuple):
    """Samples per optimizer step (all ranks), samples per forward (one rank), forwards per step."""

    train: int
    micro: int
    accumulation: int


def _quotient(total_name: str, total: int, parts: dict[str, int]) -> int:
    divisor = 1
    for value in parts.values():
        divisor *= value
    if total % divisor:
        spelled = " x ".join(f"{name} ({value})" for name, value in parts.items())
        raise ConfigError(
            f"{total_name} ({total}) is not divisible by {spelled} = {divisor}: "
            f"make {total_name} a multiple of {divisor} or change the number of ranks"
        )
    return total // divisor


def solve_batch_sizes(
    train: int | None, micro: int | None, accumulation: int | None, data_parallel_size: int
) -> BatchSizes:
    """Fill in what the user left out of the identity, as DeepSpeed does, and check what was given.

    Unlike DeepSpeed, a division with a remainder is an error here and never rounds down.
    Source: https://www.deepspeed.ai/docs/config-json/#batch-size-related-parameters
    """
    for name, value in (
        ("train_batch_size", train),
        ("train_micro_batch_size_per_gpu", micro),
        ("gradient_accumulation_steps", accumulation),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")

    ranks = {"data-parallel ranks": data_parallel_size}
    if train is None:
        if micro is None:
            raise ConfigError(
                "the config sets neither train_batch_size nor train_micro_batch_size_per_gpu: set at least one"
            )
        steps = accumulation or 1
        return BatchSizes(micro * steps * data_parallel_size, micro, steps)
    if micro is None:
        steps = accumulation or 1
        parts = {"gradient_accumulation_steps": steps} if accumulation else {}
        return BatchSizes(train, _quotient("train_batch_size", train, {**parts, **ranks}), steps)

    steps = _quotient("train_batch_size", train, {"train_micro_batch_size_per_gpu": micro, **ranks})
    if accumulation is not None and accumulation != steps:
        raise ConfigError(
            f"train_batch_size ({train}) must equal train_micro_batch_size_per_gpu ({micro}) x "
            f"gradient_accumulation_steps ({accumulation}) x data-parallel ranks ({data_parallel_size}) = "
            f"{micro * accumulation * data_parallel_size}: leave one of the three out and it is derived"
        )
    return BatchSizes(train, micro, steps)
