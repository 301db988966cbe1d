"""Streams and events of a host, where an operation is done when its call returns."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any


class Event:
    """torch.cuda.Event: the moment at which it is recorded.

    Raises:
        RuntimeError: by `elapsed_time`, as torch: one of the two is not recorded, or keeps no time.
    """

    def __init__(
        self,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> None:
        self._timing, self._when = enable_timing, None if enable_timing else 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Everything that was given to the stream before has happened by now."""
        self._when = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to `end_event`."""
        if not self._timing or not end_event._timing:
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        if self._when is None or end_event._when is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return (end_event._when - self._when) * 1e3

    def query(self) -> bool:
        """Whether what was recorded is done."""
        return True

    def synchronize(self) -> None:
        """Wait for it; it is done."""

    def wait(self, stream: Stream | None = None) -> None:
        """Let the stream wait for it; it is done."""


class Stream:
    """torch.cuda.Stream: all work is done in the order of the calls, so that every stream is the same one."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device_index, self.priority, self.cuda_stream, self.stream_id = 0, priority, 0, 0

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event, a new one where none is given."""
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Whether all work is done."""
        return True

    def synchronize(self) -> None:
        """Wait for all work; it is done."""

    def wait_event(self, event: Event) -> None:
        """Let this stream wait for an event; it is done."""

    def wait_stream(self, stream: Stream) -> None:
        """Let this stream wait for another's work; it is done."""


class OnStream:
    """torch.cuda.stream(stream): a context in which `current_stream` is this one. None changes nothing."""

    current = default = Stream()

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream
        self._before: list[Stream] = []

    def __enter__(self) -> None:
        self._before.append(OnStream.current)
        OnStream.current = self.stream or OnStream.current

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        OnStream.current = self._before.pop()
