"""What a backend offers beside its facets when it imitates another chip on the host, as "fake" does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from xtrain.backends.backend import Backend


class EmulatingBackend(Backend, ABC):
    """A backend on which faults may be asked for, and whose times are modelled."""

    @abstractmethod
    def configure(self, settings: Mapping[str, Any] | None) -> None:
        """Take the section `xtrain.fake` of the config, before `prepare`; None: there is none.

        Raises:
            ConfigError: the settings contradict each other.
        """

    @abstractmethod
    def release(self) -> None:
        """Undo what `prepare` has done to the process: the last engine is gone."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What is emulated and by what source, for the header of a run's record."""

    @abstractmethod
    def count_message(self, sent_bytes: float) -> None:
        """A collective is about to start, of which this rank sends so many bytes."""

    @abstractmethod
    def take_times(self) -> dict[str, float | int] | None:
        """Modelled seconds since the last call, for a line of the record; None when they are not modelled."""
