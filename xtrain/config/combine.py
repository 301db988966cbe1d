"""Keys that need or exclude each other. What a single key may hold is in schema.py."""

from __future__ import annotations

from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.config.schema import Config


def _gradient_sum(config: Config) -> None:
    if config.gradient_allreduce_op == "mean":
        return
    if config.zero_optimization.stage == 3:
        raise ConfigError(
            "config key 'gradient_allreduce_op' is 'sum', which is not supported with ZeRO stage 3: use stage 2"
        )


def _norm(config: Config) -> None:
    zero = config.zero_optimization
    if zero.compute_grad_norm:
        return
    if zero.stage not in (1, 2):
        raise ConfigError(
            f"config key 'zero_optimization.compute_grad_norm' is false, which ZeRO stage {zero.stage} does not "
            "support: use stage 1 or 2"
        )
    if config.gradient_clipping > 0:
        raise ConfigError(
            "config key 'zero_optimization.compute_grad_norm' is false, but gradient_clipping needs the norm: set "
            "gradient_clipping to 0 (it is 1 when left out)"
        )


def _recompute(config: Config) -> None:
    check = config.xtrain.sdc_check
    if check is None or not check.recompute:
        return
    if not config.xtrain.aligned:
        raise ConfigError(
            "config key 'xtrain.sdc_check.recompute' compares bits, which need 'xtrain.aligned': set it to true"
        )
    if config.zero_optimization.stage == 3:
        raise NotImplementedYetError(
            "config key 'xtrain.sdc_check.recompute' in ZeRO stage 3", "use stage 2, or leave the key out"
        )


def _accumulation(config: Config) -> None:
    if config.managed_gradient_accumulation:
        return
    if config.zero_optimization.overlap_comm and config.zero_optimization.stage < 2:
        raise ConfigError(
            "config key 'managed_gradient_accumulation' is false, so that step() alone knows when to reduce: "
            "overlap_comm only with ZeRO stage 2, or leave one of the two out"
        )
    if config.xtrain.aligned:
        raise ConfigError(
            "config key 'managed_gradient_accumulation' is false, but aligned mode numbers the micro-batches of a "
            "step: leave it out"
        )


def check_parameter_dtype(wanted: str | None, fp16: bool, bf16: bool) -> None:
    """Refuse a `data_types.param_dtype` that is not what the sections fp16 and bf16 make of parameters.

    Raises:
        ConfigError: they differ.
    """
    actual = "fp16" if fp16 else "bf16" if bf16 else "fp32"
    same = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    if wanted is not None and same.get(wanted, wanted) != actual:
        raise ConfigError(
            f"config key 'data_types.param_dtype' is {wanted!r}, but parameters are {actual}: enable the section of "
            "that dtype (fp16 or bf16), or leave the key out"
        )


def _module_dtype(config: Config) -> None:
    check_parameter_dtype(config.data_types.param_dtype, config.fp16.enabled, config.bf16.enabled)


def check_combinations(config: Config) -> None:
    """Refuse contradictions.

    Raises:
        ConfigError: the first one found, with what to do.
    """
    for check in (_gradient_sum, _norm, _recompute, _accumulation, _module_dtype):
        check(config)
