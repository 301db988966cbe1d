"""What the user, the login shell or the scheduler asks a run for, by signals to the launcher."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_ASK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C, scancel or kill, the end of an ssh session, a scheduler's warning before the time limit."""
_SAME = 1.0
"""Seconds in which the same signal is the same request: scancel sends it to all processes, and the keeper passes it
on."""


@dataclass
class Stop:
    """The signals that have come, and since when."""

    signals: list[int] = field(default_factory=list)
    since: float = 0.0
    _last: dict[int, float] = field(default_factory=dict)

    def ask(self, number: int, _: Any = None) -> None:
        """A signal has come."""
        now = time.monotonic()
        if not self.signals:
            self.since = now
        if now - self._last.get(number, -_SAME) >= _SAME:
            self.signals.append(number)
            self._last[number] = now

    @property
    def asked(self) -> bool:
        """Whether the run is to save and end."""
        return bool(self.signals)

    @property
    def at_once(self) -> bool:
        """Whether it is to end without saving: the same signal has come again."""
        return len(set(self.signals)) < len(self.signals)

    @property
    def warned(self) -> bool:
        """Whether the scheduler has said that the time slot ends."""
        return signal.SIGUSR1 in self.signals


@contextmanager
def catching(stop: Stop) -> Iterator[None]:
    """Collect signals instead of dying of them."""
    previous = {number: signal.signal(number, stop.ask) for number in _ASK}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
