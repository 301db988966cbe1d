"""A backend that trains on the host while it imitates another chip: its arithmetic, its times, its faults.

What is emulated, and where each property comes from, is in profiles.py, and goes into the record's header. Nothing
that runs on it says anything about the speed of the real chip.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from xtrain.backends.backend import PrecisionFacet, RuntimeFacet
from xtrain.backends.cpu import CpuZero
from xtrain.backends.emulating import EmulatingBackend
from xtrain.backends.fake.mode import mode, switch_off, switch_on, switched
from xtrain.backends.fake.profiles import PROFILES, Chosen, Costs, Numerics, Profile, choose
from xtrain.base.errors import ConfigError

__all__ = ["PROFILES", "Chosen", "Costs", "FakeBackend", "Numerics", "Profile", "choose", "switched"]

_UNITS = {"fp32": 2.0**-23, "hf32": 2.0**-11, "tf32": 2.0**-10, "fp16": 2.0**-10, "bf16": 2.0**-7}
PROFILE_VARIABLE = "XTRAIN_FAKE_PROFILE"
"""Environment variable with the profile's name, where no config has said it (yet)."""


class FakeRuntime(RuntimeFacet):
    """The host's."""

    def taken_unasked(self) -> bool:
        return False

    def device_name(self, index: int) -> str:
        return f"emulated, on {super().device_name(index)}"


class FakePrecision(PrecisionFacet):
    """The chosen profile's dtypes; norms in float64 where the chip has it."""

    def __init__(self, backend: FakeBackend) -> None:
        self._backend = backend

    @property
    def _numerics(self) -> Numerics:
        return self._backend.chosen.numerics

    @property
    def norm_dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.float32 if self._numerics.norm == "fp32" else torch.float64

    @property
    def native_dtypes(self) -> frozenset[torch.dtype]:
        always = frozenset({torch.float64, torch.float32, torch.float16})
        return always | {torch.bfloat16} if self._numerics.bf16 == "native" else always

    @property
    def stand_ins(self) -> Mapping[torch.dtype, torch.dtype]:
        return {torch.bfloat16: torch.float32} if self._numerics.bf16 == "fp32" else {}

    @property
    def float32_unit(self) -> float:
        exact = self._backend.exact and self._numerics.switchable
        return _UNITS["fp32" if exact else self._numerics.products]

    @property
    def saturates(self) -> bool:
        return self._numerics.saturate

    def take_overflow(self) -> bool:
        overflowed, mode().overflowed = mode().overflowed, False
        return overflowed

    def exact_float32(self) -> None:
        self._backend.exact = True
        self._backend.emulate()


class FakeBackend(EmulatingBackend):
    """Another chip, on the host.

    Attributes:
        chosen: the profile with the config's changes.
        exact: float32 products are exact where the chip has a switch for it, as in aligned mode.
    """

    name = "fake"
    runtime = FakeRuntime()
    zero = CpuZero()

    def __init__(self) -> None:
        self.precision = FakePrecision(self)
        self.exact = False
        self._configured: Chosen | None = None
        self._faults: list[Any] = []

    @property
    def chosen(self) -> Chosen:
        """What is emulated: the config's, else that of XTRAIN_FAKE_PROFILE, else nothing.

        Raises:
            ConfigError: there is no such profile.
        """
        return self._configured or choose(os.environ.get(PROFILE_VARIABLE) or "none")

    def configure(self, settings: Mapping[str, Any] | None) -> None:
        self._faults = [] if settings is None else settings.get("faults", [])
        if settings is None:
            self._configured = None
            return
        name = settings.get("profile") or os.environ.get(PROFILE_VARIABLE)
        if not name and settings.get("numerics"):
            raise ConfigError(
                "config key 'xtrain.fake.numerics' changes a profile, and none is named: set 'xtrain.fake.profile', "
                'to "custom" for none of those there are'
            )
        self._configured = choose(name or "none", settings.get("numerics"), settings.get("cost"))

    def prepare(self, local_rank: int, aligned: bool = False) -> None:
        self.exact = False
        super().prepare(local_rank, aligned)
        self.emulate()

    def emulate(self) -> None:
        """Switch the operators of the chosen profile on in this thread."""
        switch_on(self.chosen.numerics, self.exact, self.chosen.costs)

    def release(self) -> None:
        switch_off()

    def describe(self) -> dict[str, Any]:
        described = self.chosen.describe()
        if self.exact and self.chosen.numerics.switchable and "products" in described["numerics"]:
            described["numerics"]["products"]["switched_off"] = "aligned mode"
        if self._faults:
            described["faults"] = self._faults
        return described

    def count_message(self, sent_bytes: float) -> None:
        if (clock := mode().clock) is not None:
            clock.message(sent_bytes)

    def take_times(self) -> dict[str, float | int] | None:
        return None if (clock := mode().clock) is None else clock.take()
