"""Whether ranks still go on, and which one the others wait for when they don't."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

_WAITS_IN = ("/comm/", "torch/distributed")
"""Files whose code waits for other ranks."""
_OWN_WORK = 4
"""Times the stated time that a rank may be at work without a step."""
_TOP = 12
"""Innermost frames of a stack that are looked at."""


@dataclass
class Pulse:
    """What was last heard of a rank: its step, its signs of life, its process's state, and since when it is quiet."""

    step: int
    count: int
    state: str
    since: float


class Pulses:
    """Of all ranks."""

    def __init__(self) -> None:
        self.ranks: dict[int, Pulse] = {}

    def take(self, rank: int, step: int, count: int, state: str) -> None:
        """An agent has said how far a rank is."""
        known, now = self.ranks.get(rank), time.monotonic()
        if known is None or known.count != count:
            self.ranks[rank] = Pulse(step, count, state, now)
        else:
            known.state = state

    @property
    def begun(self) -> bool:
        """Whether a step has been made: before that, ranks load, compile and wait for data for as long as they like."""
        return any(pulse.step > 0 and pulse.count > 2 for pulse in self.ranks.values())

    @property
    def quiet(self) -> float:
        """Seconds in which no rank has gone on."""
        return min((time.monotonic() - pulse.since for pulse in self.ranks.values()), default=0.0)

    def frozen(self, seconds: float) -> list[int]:
        """Ranks that were stopped (SIGSTOP, a debugger) and have not gone on for so long."""
        now = time.monotonic()
        return [
            rank for rank, pulse in self.ranks.items() if pulse.state == "T" and now - pulse.since > seconds
        ]

    def hangs(self, seconds: float) -> bool:
        """Whether nothing goes on any more."""
        if not seconds:
            return False
        return (self.begun and self.quiet > seconds) or bool(self.frozen(seconds))

    def works(self, seconds: float, stacks: Mapping[int, Sequence[str]], busy: Collection[int]) -> bool:
        """Whether a rank is at work on something of the script's own (an evaluation, say) while the others wait for it.

        It gets several times as long: nothing tells such work from a loop that never ends.
        """
        own = [rank for rank, frames in stacks.items() if rank in busy and not _waits(frames)]
        return bool(own) and self.quiet < _OWN_WORK * seconds and not self.frozen(seconds)

    def suspect(self, stacks: Mapping[int, Sequence[str]]) -> tuple[int | None, str]:
        """The rank that the others wait for, if it can be told, and why it is that one.

        Args:
            stacks: innermost frames of each rank's main thread, where it could write them.
        """
        quiet = f"{self.quiet:.0f} s"
        for state, what in (
            ("T", "is stopped (SIGSTOP or a debugger)"),
            ("D", "waits for a disk or a device"),
        ):
            if len(found := [rank for rank, pulse in self.ranks.items() if pulse.state == state]) >= 1:
                return min(found), f"{what} and has not gone on for {quiet}"
        outside = [rank for rank, frames in stacks.items() if not _waits(frames)]
        if len(outside) == 1 and len(stacks) > 1:
            return outside[
                0
            ], f"has not gone on for {quiet}, in {stacks[outside[0]][0]}; the others wait for it"
        counts = {rank: pulse.count for rank, pulse in self.ranks.items()}
        behind = [rank for rank, count in counts.items() if count == min(counts.values())]
        if len(behind) == 1 and len(counts) > 1:
            return behind[0], f"has not gone on for {quiet}; the others are further and wait"
        return None, f"no rank has gone on for {quiet}"


def _waits(frames: Sequence[str]) -> bool:
    return any(place in frame for frame in frames[:_TOP] for place in _WAITS_IN)


def frames_of(text: str) -> list[str]:
    """The frames of the thread that got the signal in what faulthandler has written, the innermost first."""
    frames: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.startswith(("Current thread", "Thread 0x")):
            inside = line.startswith("Current thread")
            frames = [] if inside else frames
        elif inside and line.startswith("  File "):
            frames.append(line.strip().removeprefix("File "))
    return frames
