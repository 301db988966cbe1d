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


class Bf16Config(Section):
    """`bf16`: parameters and gradients in bfloat16, master weights and optimizer states in float32."""

    enabled: bool = False
    check_grad_overflow: bool = True
    """Skip the step on all ranks when the gradient norm is not finite. False, in stages 1 and 2: apply it all the same
    (stages 0 and 3 skip it, as in DeepSpeed)."""
    immediate_grad_update: Annotated[bool, NoEffect("gradients are accumulated in place as they arrive")] = (
        False
    )
    bf16_master_weights_and_grads: Annotated[bool, NotYet("masters are kept in float32")] = False
    bf16_optimizer_states: Annotated[bool, NotYet("optimizer states are kept in float32")] = False


class Fp16Config(Section):
    """`fp16`: parameters and gradients in float16, masters in float32, the loss scaled."""

    enabled: bool = False
    auto_cast: Annotated[bool, NotYet("cast the inputs in the script")] = False
    loss_scale: float = Field(0.0, ge=0)
    """A constant scale; 0 adapts it."""
    initial_scale_power: int = 16
    loss_scale_window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: int = 1
    fp16_master_weights_and_grads: Annotated[bool, NotYet("masters are kept in float32")] = False

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
    """`torch_autocast`: the forward pass under torch.autocast; parameters and gradients stay in float32."""

    ignores_unknown: ClassVar[bool] = True
    enabled: bool = False
    dtype: Annotated[Literal["bf16", "bfloat16", "fp16", "float16"], _AnySpelling] = "bfloat16"
    """With fp16 the loss is scaled dynamically, as torch.amp.GradScaler does. (DeepSpeed's default is torch's choice
    for the device, which may be fp16, and is then not scaled.)"""
    lower_precision_safe_modules: Annotated[
        list[str] | None,
        NoEffect(
            "it names modules whose gradients may travel in the autocast dtype; here all travel in float32, or in "
            "communication_data_type"
        ),
    ] = None


class DataTypesConfig(Section):
    """`data_types`."""

    ignores_unknown: ClassVar[bool] = True
    grad_accum_dtype: DtypeName | None = None
    """Dtype in which micro-batch gradients are added up and reduced. None: the parameters' dtype."""
    param_dtype: DtypeName | None = None
    """Must be what the fp16 and bf16 sections say."""
    buffer_dtype: DtypeName | None = None
    """Floating-point buffers are cast to it. None: they keep their dtype."""
    keep_in_fp32_modules: Annotated[
        str | list[str] | None, NotYet("keep the module out of the engine, or train in fp32")
    ] = None
