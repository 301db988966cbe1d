"""The dtypes of a run, in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from xtrain.backends import Backend
from xtrain.base.errors import ConfigError
from xtrain.base.log import log_dist
from xtrain.config.schema import Config

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class PrecisionPolicy:
    """What the config says about dtypes and about scaling around the reduction.

    Attributes:
        module: parameters are cast to it, buffers are not; None leaves them as they are.
        accumulation: micro-batch gradients are added up in it; None is the parameters' own.
        communication: gradients travel in it; None is the accumulation dtype.
        skip_non_finite: leave the weights alone when the gradient norm is infinite or NaN.
        apply_non_finite: update the weights even then, because the config has switched the check off.
        aligned: gradients are accumulated, sent and summed in float32 by one fixed tree.
        buffers: floating-point buffers are cast to it; None leaves them as they are.
        average: gradients are averaged over ranks; False: they are summed.
        predivide: gradients are divided by it before they are summed over ranks; None means by the
            number of ranks. The rest of the average is taken afterwards, in the accumulation dtype.
    """

    module: torch.dtype | None
    accumulation: torch.dtype | None
    communication: torch.dtype | None
    skip_non_finite: bool
    predivide: float | None
    aligned: bool = False
    average: bool = True
    buffers: torch.dtype | None = None
    apply_non_finite: bool = False

    def accumulation_of(self, dtype: torch.dtype) -> torch.dtype:
        """Accumulation dtype for parameters of `dtype`; never narrower than they are."""
        return torch.promote_types(dtype, self.accumulation) if self.accumulation else dtype


def _skips_non_finite(config: Config) -> bool:
    """As in DeepSpeed: fp16 always, bf16 unless told otherwise, fp32 where optimizer states are divided."""
    if config.fp16.enabled:
        return True
    if config.bf16.enabled:
        return not _applies_non_finite(config)
    if config.torch_autocast.enabled and config.torch_autocast.dtype in ("fp16", "float16"):
        return True
    return config.zero_optimization.stage > 0


def _applies_non_finite(config: Config) -> bool:
    """As in DeepSpeed, whose stages 0 and 3 do not read the key."""
    switched_off = config.bf16.enabled and not config.bf16.check_grad_overflow
    return switched_off and config.zero_optimization.stage in (1, 2)


def make_policy(config: Config, sequence_parallel: bool = False) -> PrecisionPolicy:
    """Read the sections that concern precision.

    Args:
        sequence_parallel: gradients are also summed over the parts of a sample, which has a dtype of its own.

    Raises:
        ConfigError: fp16 and bf16 are both enabled, or aligned mode is combined with a dtype it rules out.
    """
    if config.fp16.enabled and config.bf16.enabled:
        raise ConfigError("config keys 'fp16.enabled' and 'bf16.enabled' are both true: choose one")
    module = torch.float16 if config.fp16.enabled else torch.bfloat16 if config.bf16.enabled else None
    accumulation = config.data_types.grad_accum_dtype
    key = "seq_parallel_communication_data_type" if sequence_parallel else "communication_data_type"
    communication = getattr(config, key) or ("fp32" if sequence_parallel else None)
    if config.xtrain.aligned:
        for named, name in (("data_types.grad_accum_dtype", accumulation), (key, communication)):
            if name is not None and DTYPES[name] != torch.float32:
                raise ConfigError(
                    f"config key {named!r} is {name!r}, but aligned mode adds in fp32: remove the key"
                )
        accumulation = communication = "fp32"
    return PrecisionPolicy(
        module=module,
        accumulation=DTYPES[accumulation] if accumulation else None,
        communication=DTYPES[communication] if communication else None,
        aligned=config.xtrain.aligned,
        skip_non_finite=_skips_non_finite(config),
        apply_non_finite=_applies_non_finite(config),
        average=config.gradient_allreduce_op == "mean",
        buffers=DTYPES[config.data_types.buffer_dtype] if config.data_types.buffer_dtype else None,
        predivide=_predivide(config),
    )


def _predivide(config: Config) -> float | None:
    """A sum is never divided, as in DeepSpeed."""
    if config.gradient_allreduce_op == "sum":
        return 1.0
    return None if config.prescale_gradients else config.gradient_predivide_factor


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def for_backend(policy: PrecisionPolicy, config: Config, backend: Backend) -> PrecisionPolicy:
    """The policy on one chip: its stand-in for a dtype that it lacks (logged), its accumulation dtype.

    Raises:
        ConfigError: the config asks for a dtype that the chip neither has nor replaces.
    """
    facet = backend.precision
    native, module = facet.native_dtypes, policy.module
    if module is not None and module not in native and module in facet.stand_ins:
        log_dist(
            f"backend {backend.name!r} has no {_short(module)} on this chip: the model is trained in "
            f"{_short(facet.stand_ins[module])} instead (fp16.enabled computes in fp16)",
            ranks=[0],
        )
        module = facet.stand_ins[module]
    cast = DTYPES[config.torch_autocast.dtype] if config.torch_autocast.enabled else None
    for key, dtype in (("fp16 or bf16", module), ("torch_autocast.dtype", cast)):
        if dtype is not None and dtype not in native:
            raise ConfigError(
                f"config key {key!r} asks for {_short(dtype)}, which backend {backend.name!r} does not compute in on "
                f"this chip: use one of {', '.join(sorted(map(_short, native)))}"
            )
    return replace(policy, module=module, accumulation=policy.accumulation or facet.accumulation_dtype)
