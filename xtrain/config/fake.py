"""`xtrain.fake` and `xtrain.sdc_check`: what the backend "fake" emulates, and what is checked for silent corruption.

Profiles, and what each property means, are in backends/fake/profiles.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from xtrain.config.rules import OnlyNative, Section


class FakeNumericsConfig(Section):
    """Changes to the profile's arithmetic. A key that is left out is as in the profile."""

    products: Literal["fp32", "tf32", "hf32", "bf16", "fp16"] | None = None
    """Format that float32 inputs of matrix products and convolutions are rounded to."""
    rounding: Literal["nearest-even", "nearest-away", "toward-zero"] | None = None
    """How they are rounded to tf32 and hf32; bf16 and fp16 are always rounded to nearest, ties to even."""
    switchable: bool | None = None
    """Whether aligned mode gets exact float32 products, as on a chip that has a switch for it."""
    accumulation: Literal["fp16", "bf16", "fp32", "fp64"] | None = None
    """Format of the sum in which products are added up."""
    block: int | None = Field(None, ge=0)
    """Products that are added together before their sum goes to the total; 0: the host's order."""
    sums: int | None = Field(None, ge=0)
    """Elements that one worker adds up in reductions, softmax and norms, before workers are added up by a tree; 0: the
    host's order."""
    flush_denormals: bool | None = None
    """Results below the smallest normal number become zero."""
    saturate: bool | None = None
    """Overflow in float16 gives the largest number instead of infinity, and raises a flag that skips the step."""
    bf16: Literal["native", "fp32", "refused"] | None = None
    """What becomes of a bf16 config: trained in bf16, trained in float32, or refused."""
    norm: Literal["fp64", "fp32"] | None = None
    """Format in which the gradient norm's squares are added up."""


class FakeCostConfig(Section):
    """Modelled times of the chip; the lines of the record have them under "modelled". Left out: none."""

    profile: str | None = None
    """Profile whose rates are used. Left out: that of `xtrain.fake.profile`."""
    flops: dict[Literal["tf32", "fp32", "fp64", "fp16", "bf16"], Annotated[float, Field(gt=0)]] | None = None
    """Floating-point operations per second of matrix products, by the format of their inputs."""
    memory: float | None = Field(None, gt=0)
    """Bytes per second between the chip and its memory."""
    link: float | None = Field(None, gt=0)
    """Bytes per second from a rank to others."""
    latency: float | None = Field(None, ge=0)
    """Seconds that a collective takes at least."""
    sleep: bool | None = None
    """Let the process wait as long as the model says."""


class FaultConfig(Section):
    """A list; each entry is something that goes wrong once, on one rank."""

    kind: Literal["bit_flip", "nan", "slow_rank", "lost_message", "killed_rank"]
    """A flipped bit, a NaN, a rank that is slow, a collective that this rank never starts, or a process that ends."""
    step: int = Field(ge=1)
    """Optimizer step in which it happens, as the record counts them."""
    rank: int = Field(0, ge=0)
    """Rank on which it happens."""
    last_step: int | None = Field(None, ge=1)
    """slow_rank: the last step that is slow. Left out: `step` alone."""
    seconds: float | None = Field(None, gt=0)
    """slow_rank: seconds that a step takes longer. lost_message: seconds that the rank waits; left out: longer than the
    others."""
    target: Literal["parameter", "gradient", "activation"] = "parameter"
    """bit_flip and nan: what is hit. A parameter before the step's first forward pass, a gradient as it arrives, before
    it is added to others; an activation as a module returns it."""
    name: str | None = None
    """bit_flip and nan: name of the parameter, or of the module whose output is hit."""
    element: int = Field(0, ge=0)
    """bit_flip and nan: number of the element in the flattened tensor."""
    bit: int | None = Field(None, ge=0)
    """bit_flip: number of the bit; 0 is the lowest of the mantissa."""
    micro_batch: int = Field(0, ge=0)
    """Targets gradient and activation: number of the micro-batch in the step."""
    message: int = Field(0, ge=0)
    """lost_message: number of the collective among those of the step."""

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
    """What the backend "fake" emulates; for that backend only (docs/backends.md)."""

    profile: str | None = None
    """The chip: "none", "a100-tf32", "ascend910-fp16", "ascend910b-hf32", "dcu-nobf16", "sw26010pro", or "custom" with
    everything said under `numerics`. Left out: XTRAIN_FAKE_PROFILE, else "none"."""
    numerics: FakeNumericsConfig = FakeNumericsConfig()
    cost: Annotated[FakeCostConfig | None, OnlyNative()] = None
    """`{}` counts with the profile's rates."""
    faults: Annotated[list[FaultConfig], OnlyNative(fine=([],))] = []


class SdcCheckConfig(Section):
    """Compare what must be equal, to find processors that compute wrongly in silence (docs/sdc.md)."""

    every: int = Field(100, ge=1)
    """Optimizer steps between two checks."""
    on_mismatch: Literal["error", "warn"] = "error"
    """End training on every rank, or log a warning and go on."""
    own_states: bool = True
    """Also that what only one rank has (slices of parameters, master weights, optimizer states) did not change between
    two updates."""
    recompute: bool = False
    """Also compute the first micro-batch of the step again on the neighbouring rank, output and gradients, and compare
    bits. Needs `xtrain.aligned`, and a ZeRO stage below 3."""
