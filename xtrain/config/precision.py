"""Configuration sections of number formats: bf16, fp16 with its loss scale, autocast, accumulation.

Part of the schema (schema.py).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from xtrain.config.rules import NoEffect, NotYet, Section


def _plain_dtype(value: Any) -> Any:
    """A dtype as this schema spells it, from the spellings that DeepSpeed takes: "torch.bfloat16", "half", a dtype."""
    if not isinstance(value, str) and type(value).__name__ != "dtype":
        return value
    name = str(value).lower().removeprefix("torch.")
    same = {"half": "float16", "float": "float32"}
    known = ("fp32", "float32", "bf16", "bfloat16", "fp16", "float16")
    name = same.get(name, name)
    return name if name in known else value


_AnySpelling = BeforeValidator(_plain_dtype)
DtypeName = Annotated[Literal["fp32", "float32", "bf16", "bfloat16", "fp16", "float16"], _AnySpelling]


def _number(value: Any) -> Any:
    """The value itself, if it may be a number: pydantic's own sentence for a list says "valid number" only."""
    if isinstance(value, (list, tuple, dict, set)):
        raise ValueError(f"must be a number, not a {type(value).__name__}")
    return value


class Bf16Config(Section):
    """Parameters and gradients in bfloat16, master weights and optimizer states in float32."""

    enabled: bool = False
    """Train in bfloat16. A chip without it refuses, or trains in fp32 (docs/backends.md)."""
    check_grad_overflow: bool = True
    """Skip the step on all ranks when the gradient norm is not finite. False, in stages 1 and 2: apply it all the same
    (stages 0 and 3 skip it, as in DeepSpeed)."""
    immediate_grad_update: Annotated[bool, NoEffect("gradients are accumulated in place as they arrive")] = (
        False
    )
    """In DeepSpeed: add gradients to the float32 ones as soon as they arrive."""
    bf16_master_weights_and_grads: Annotated[bool, NotYet("masters are kept in float32")] = False
    """In DeepSpeed: keep master weights and their gradients in bfloat16."""
    bf16_optimizer_states: Annotated[bool, NotYet("optimizer states are kept in float32")] = False
    """In DeepSpeed: keep the optimizer's states in bfloat16 as well."""


class Fp16Config(Section):
    """Parameters and gradients in float16, master weights and optimizer states in float32. The loss is multiplied by a
    scale, so that small gradients do not become zero; a step whose gradients overflow is skipped on all ranks."""

    enabled: bool = False
    """Train in float16."""
    auto_cast: Annotated[bool, NotYet("cast the inputs in the script")] = False
    """In DeepSpeed: cast the model's inputs to float16."""
    loss_scale: Annotated[float, BeforeValidator(_number)] = Field(0.0, ge=0)
    """A constant scale. 0: the scale adapts, by the keys below."""
    initial_scale_power: int = 16
    """The first scale is 2 to this power. A backend may have another default."""
    loss_scale_window: int = 1000
    """Steps in a row without overflow before the one after which the scale doubles."""
    hysteresis: int = 2
    """The scale is halved at the overflow of this number and at each one after it; steps that overflow before it are
    only skipped. In stage 0 it is always 1, as in DeepSpeed."""
    consecutive_hysteresis: bool = False
    """Start counting overflows for hysteresis anew after each good step. False: when the scale doubles."""
    min_loss_scale: int = 1
    """The scale never falls below it. An overflow at this scale ends training with an error in stages 1 to 3."""
    fp16_master_weights_and_grads: Annotated[bool, NotYet("masters are kept in float32")] = False
    """In DeepSpeed: keep master weights and their gradients in float16."""

    @model_validator(mode="after")
    def _the_scale_is_a_float32(self) -> Fp16Config:
        if not self.enabled:
            return self
        if self.loss_scale > 2.0**127:
            raise ValueError("loss_scale must be at most 2**127")
        if self.loss_scale == 0:
            for name in ("loss_scale_window", "hysteresis", "min_loss_scale"):
                if getattr(self, name) <= 0:
                    raise ValueError(f"{name} must be positive where the loss scale adapts")
            if not -126 <= self.initial_scale_power <= 127:
                raise ValueError("initial_scale_power must be between -126 and 127")
            if self.min_loss_scale > 2**127:
                raise ValueError("min_loss_scale must be at most 2**127")
        return self


class TorchAutocastConfig(Section):
    """The forward pass runs under torch.autocast; parameters and gradients are kept in float32."""

    ignores_unknown: ClassVar[bool] = True
    enabled: bool = False
    """Run forward under torch.autocast."""
    dtype: Annotated[Literal["bf16", "bfloat16", "fp16", "float16"], _AnySpelling] = "bfloat16"
    """What autocast computes in. With fp16 the loss is scaled dynamically, as torch.amp.GradScaler does. (DeepSpeed's
    default is torch's choice for the device, which may be fp16, and is then not scaled.)"""
    lower_precision_safe_modules: list[str] | None = None
    """Classes of modules, with their packages, whose gradients travel in the autocast dtype. Left out: torch's Linear,
    Conv1d, Conv2d and Conv3d. An empty list: none. Aligned mode sends all in float32."""


class DataTypesConfig(Section):
    """Dtypes beside those of the sections fp16 and bf16."""

    ignores_unknown: ClassVar[bool] = True
    grad_accum_dtype: DtypeName | None = None
    """Dtype in which micro-batch gradients are added up and reduced, if it is wider than the parameters'. Left out: the
    parameters' dtype, or the backend's choice."""
    param_dtype: DtypeName | None = None
    """Dtype of the parameters; it must be what the sections fp16 and bf16 say."""
    buffer_dtype: DtypeName | None = None
    """Floating-point buffers of the module are cast to it. Left out: they keep their dtype."""
    keep_in_fp32_modules: Annotated[
        str | list[str] | None, NotYet("keep the module out of the engine, or train in fp32")
    ] = None
    """In DeepSpeed: names of modules that stay in float32."""
