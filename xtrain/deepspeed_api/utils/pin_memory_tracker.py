"""`deepspeed.utils.pin_memory_tracker`: how much page-locked host memory a script has allocated.

The engine's own page-locked buffers are not counted: `see_memory_usage` shows what the process has.
"""

from __future__ import annotations

from xtrain.base.log import log_dist

_GIB = 2**30
_FIRST = 32 * _GIB
"""A line is logged when this much is reached, and at each doubling: forgotten pinned buffers show early."""
_UNITS = (("GB", _GIB, 3), ("MB", 2**20, 2), ("KB", 2**10, 1))


class PinnedMemoryTracker:
    """Sums of what was told.

    Attributes:
        _bytes, _calls: allocated so far, and how often.
        _next_checkpoint: bytes at which the next line is logged.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Count from nothing."""
        self._bytes = self._calls = 0
        self._next_checkpoint = _FIRST

    def add(self, nbytes: int) -> None:
        """Count an allocation."""
        self._bytes += nbytes
        self._calls += 1
        crossed = 0
        while self._bytes >= self._next_checkpoint:
            crossed, self._next_checkpoint = self._next_checkpoint, 2 * self._next_checkpoint
        if crossed:
            log_dist(
                f"pinned memory checkpoint: more than {_fmt_bytes(crossed)} of host memory are page-locked: "
                f"{_fmt_bytes(self._bytes)} in {self._calls} allocations"
            )


_tracker = PinnedMemoryTracker()


def _fmt_bytes(n: int) -> str:
    """For example `1.50 MB`."""
    for unit, size, digits in _UNITS:
        if n >= size:
            return f"{n / size:.{digits}f} {unit}"
    return f"{n} B"


def track_pinned_memory(nbytes: int) -> None:
    """Count an allocation of so many bytes of page-locked host memory."""
    _tracker.add(nbytes)


def pinned_memory_summary(tag: str = "") -> None:
    """Log how much there is by now."""
    log_dist(f"pinned memory {tag}: {_fmt_bytes(_tracker._bytes)} in {_tracker._calls} allocations")
