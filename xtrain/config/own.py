"""Configuration section `xtrain`: what DeepSpeed has no key for.

Part of the schema (schema.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from xtrain.config.fake import FakeConfig, SdcCheckConfig
from xtrain.config.rules import OnlyNative, Section


class RecordConfig(Section):
    """The run record: what rank 0 writes of every step (docs/record.md). A string instead of the section means its
    path."""

    path: str | None = None
    """File (JSON Lines) that rank 0 writes. Left out: `metrics.jsonl` in the launcher's run folder."""
    modules_every: int | None = Field(None, gt=0)
    """Steps between two measurements of activations, gradients and parameters of each module. Left out: none."""
    modules: list[str] | None = None
    """Names of the modules to measure, with * and ?. Left out: those with parameters of their own, or no children."""


class XtrainSection(Section):
    """Keys that only xtrain has."""

    backend: str | None = None
    """Name of the backend (docs/backends.md); it wins over XTRAIN_BACKEND, DS_ACCELERATOR and detection."""
    engine: Literal["native", "deepspeed"] = "native"
    """"native": xtrain trains. "deepspeed": the installed DeepSpeed trains, on this backend and with this record; every
    key of its config is then its own affair, and keys that only xtrain's engine has are refused
    (docs/deepspeed_engine.md)."""
    strict: bool = False
    """True: a key that nobody reads is an error. False: it is ignored with a warning where DeepSpeed ignores it."""
    aligned: Annotated[bool, OnlyNative()] = False
    """Bits that do not depend on ZeRO stage or on how a batch is split over ranks and accumulation (powers
    of two): canonical sums in float32, one optimizer arithmetic, counter-based dropout (docs/aligned.md)."""
    seed: Annotated[int, OnlyNative()] = Field(1234, ge=0, lt=2**63)
    """Seed of the dropout masks in aligned mode."""
    max_skipped_steps: Annotated[int, OnlyNative()] = Field(20, ge=0)
    """Steps in a row with gradients that are not finite, after which training ends with an error; 0: never. Does not
    count where the loss scale adapts: there the smallest scale is the limit."""
    record: RecordConfig | None = None
    """Left out: no record, unless the launcher asks for one."""
    tokens_per_sample: int | None = Field(None, gt=0)
    """Tokens in one sample; with it the record and the progress display count tokens."""
    fake: FakeConfig | None = None
    sdc_check: Annotated[SdcCheckConfig | None, OnlyNative()] = None
    """Left out: no checks."""

    @field_validator("record", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value
