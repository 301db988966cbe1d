"""`xtrain.fake` and `xtrain.sdc_check`: what the backend "fake" emulates, and what is checked for silent corruption.

Profiles, and what each property means, are in backends/fake/profiles.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from xtrain.config.rules import OnlyNative, Section


class FakeNumericsConfig(Section):
    """`xtrain.fake.numerics`: changes to the profile's arithmetic. A key that is left out is the profile's."""

    products: Literal["fp32", "tf32", "hf32", "bf16", "fp16"] | None = None
    """Format that float32 inputs of matrix products and convolutions are rounded to."""
    rounding: Literal["nearest-even", "nearest-away", "toward-zero"] | None = None
    """How they are rounded to tf32 and hf32."""
    switchable: bool | None = None
    """Whether aligned mode switches that off."""
    accumulation: Literal["fp16", "bf16", "fp32", "fp64"] | None = None
    """Format of the sum in which products are added up."""
    block: int | None = Field(None, ge=0)
    """So many products are added together at a time before their sum is added to that; 0: the host's order."""
    sums: int | None = Field(None, ge=0)
    """Elements that one worker adds up in reductions, softmax and norms, before workers are added up by a tree; 0: the
    host's order."""
    flush_denormals: bool | None = None
    saturate: bool | None = None
    """Overflow in float16 gives the largest number instead of infinity."""
    bf16: Literal["native", "fp32", "refused"] | None = None
    """"fp32": models of a bf16 config are trained in float32."""
    norm: Literal["fp64", "fp32"] | None = None
    """Format in which the gradient norm's squares are added up."""


class FakeCostConfig(Section):
    """`xtrain.fake.cost`: modelled times; the record's lines have them under "modelled"."""

    profile: str | None = None
    """Whose rates; None: those of `xtrain.fake.profile`."""
    flops: dict[Literal["tf32", "fp32", "fp64", "fp16", "bf16"], Annotated[float, Field(gt=0)]] | None = None
    """Operations per second of matrix products, by format."""
    memory: float | None = Field(None, gt=0)
    """Bytes per second between the chip and its memory."""
    link: float | None = Field(None, gt=0)
    """Bytes per second from a rank to others."""
    latency: float | None = Field(None, ge=0)
    """Seconds that a collective takes at least."""
    sleep: bool | None = None
    """Wait as long as the model says."""


class FaultConfig(Section):
    """An entry of `xtrain.fake.faults`: something that goes wrong once, on one rank."""

    kind: Literal["bit_flip", "nan", "slow_rank", "lost_message", "killed_rank"]
    step: int = Field(ge=1)
    """Optimizer step in which it happens, as the record counts them."""
    rank: int = Field(0, ge=0)
    last_step: int | None = Field(None, ge=1)
    """slow_rank: the last step that is slow; None: `step`."""
    seconds: float | None = Field(None, gt=0)
    """slow_rank: how much longer a step takes. lost_message: how long the rank waits; None: longer than the others."""
    target: Literal["parameter", "gradient", "activation"] = "parameter"
    """bit_flip and nan: what is hit. A parameter before the step's first forward pass, a gradient as it arrives, before
    it is added to others; an activation as a module returns it."""
    name: str | None = None
    """Of the parameter, or of the module whose output is hit."""
    element: int = Field(0, ge=0)
    """Number of the element in the flattened tensor."""
    bit: int | None = Field(None, ge=0)
    """bit_flip: which bit, 0 the lowest of the mantissa."""
    micro_batch: int = Field(0, ge=0)
    """Gradient and activation: in which micro-batch of the step."""
    message: int = Field(0, ge=0)
    """lost_message: the number of the collective among those of the step."""

    @model_validator(mode="after")
    def _complete(self) -> FaultConfig:
        hits = self.kind in ("bit_flip", "nan")
        if hits and self.name is None:
            raise ValueError(f"{self.kind} needs the name of a parameter or module")
        if (self.kind == "bit_flip") != (self.bit is not None):
            raise ValueError("bit_flip needs a bit, and nothing else has one")
        if (self.kind == "slow_rank") and self.seconds is None:
            raise ValueError("slow_rank needs seconds")
        if self.last_step is not None and (self.kind != "slow_rank" or self.last_step < self.step):
            raise ValueError("last_step is for slow_rank, and not before step")
        return self


class FakeConfig(Section):
    """`xtrain.fake`: what the backend "fake" emulates; for that backend only."""

    profile: str | None = None
    """"none", "a100-tf32", "ascend910-fp16", "ascend910b-hf32", "dcu-nobf16", "sw26010pro", or "custom" with everything
    said under `numerics`. None: XTRAIN_FAKE_PROFILE, else "none"."""
    numerics: FakeNumericsConfig = FakeNumericsConfig()
    cost: Annotated[FakeCostConfig | None, OnlyNative()] = None
    """{} counts with the profile's rates."""
    faults: Annotated[list[FaultConfig], OnlyNative(fine=([],))] = []


class SdcCheckConfig(Section):
    """`xtrain.sdc_check`: comparing what must be equal, to find processors that compute wrongly in silence
    (docs/sdc.md)."""

    every: int = Field(100, ge=1)
    """Steps between two checks."""
    on_mismatch: Literal["error", "warn"] = "error"
    """End training on every rank, or log a warning and go on."""
    own_states: bool = True
    """Also that what only one rank has (slices of parameters, master weights, optimizer states) did not change between
    two updates."""
    recompute: bool = False
    """Also compute the first micro-batch of the step again on the neighbouring rank, output and gradients, and compare
    bits. Needs `xtrain.aligned`, and a ZeRO stage below 3."""
