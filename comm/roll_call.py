"""Who is here, and who has what, asked of the store: for ranks that may be waiting for each other elsewhere.

A collective needs all ranks at once. A rank inside a file lock has it only when the others wait for that lock, and then
everybody waits for ever. Here a rank leaves a note and goes on when its patience is over. A few questions to the store
for each rank, whatever their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from xtrain.base.errors import PeerLostError
from xtrain.comm import rendezvous

_NAP = 0.01
_LEFT = 2**32
"""What a rank that leaves adds to the number of those who came: more than there are ranks."""
_MOST_NOTES = 64
"""Ranks whose notes are read when they differ."""
_LOOK_FOR_ENDED = 2.0
_WAIT_FOR_READERS = 2.0


class RollCall:
    """Some ranks at the store of the running process group.

    Args:
        name: of the roll call, the same on its ranks and on no others; each question has a name of its own, too.
        ranks: global ranks that take part, this one among them.
    """

    def __init__(self, name: str, ranks: Sequence[int]) -> None:
        self.ranks = list(ranks)
        self._rank = dist.get_rank()
        store: Any = dist.distributed_c10d._get_default_store()  # Any: torch's stubs lack `timeout`
        self.timeout: timedelta = store.timeout
        """How long a rank waits for the others where it cannot go on without them."""
        self._store = dist.PrefixStore(f"roll call {name}", store)

    def all_here(self, question: str, patience: float, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Whether all ranks come within `patience` seconds of the first; the same answer on every rank.

        Once a rank has left with False, so does everybody who comes later, at once. `meanwhile` is called again and
        again while this one waits; what it raises ends the waiting.
        """
        arrived, decided = f"{question} arrived", f"{question} decided"
        number = self._store.add(arrived, 1)
        if number > _LEFT:
            return False
        if number < len(self.ranks):
            if self._wait(decided, patience, meanwhile):
                return self._store.get(decided) == b"here"
            left, came = divmod(self._store.add(arrived, _LEFT), _LEFT)
            if left > 1:  # the first that left knows
                return self._store.get(decided) == b"here"
            if came < len(self.ranks):
                self._store.set(decided, "left")
                return False
        self._store.set(decided, "here")
        return True

    def raise_to(self, question: str, number: int) -> None:
        """Tell a number of at least 0, of which the highest counts. Waits for nobody."""
        key, mine = f"{question} highest", str(number)
        current = self._store.compare_set(key, "", mine)
        while int(current) < number:
            current = self._store.compare_set(key, current.decode(), mine)

    def highest(self, question: str) -> int:
        """The highest number of those who have told theirs; of all ranks after `all_here`."""
        return int(self._store.get(f"{question} highest"))

    def first(self, question: str, mine: str) -> str:
        """The note of the rank that asked first: `mine`, or that of an earlier one. Waits for nobody."""
        if self._store.add(f"{question} asked", 1) == 1:
            self._store.set(f"{question} note", mine)
            return mine
        found: bytes = self._store.get(f"{question} note")  # on its way
        return found.decode()

    def compare(self, question: str, mine: str, note: str) -> dict[str, list[int]] | None:
        """Wait for all ranks; None when all have the same `mine`, else the ranks by what they noted about theirs.

        Raises:
            PeerLostError: some rank has ended, or does not come in time; says which.
        """
        self._store.set(f"{question} rank {self._rank}", note)
        self._store.add(f"{question} has {mine}", 1)
        number = self._store.add(f"{question} arrived", 1)
        if number == len(self.ranks):
            # The one who comes last knows: all others have counted what they have before they arrived.
            alike = self._store.add(f"{question} has {mine}", 0) == number
            self._store.set(f"{question} verdict", "alike" if alike else "different")
        if not self._wait(
            f"{question} verdict", self.timeout.total_seconds(), self._look_for_ended(question)
        ):
            raise self._late(question, [])
        if self._store.get(f"{question} verdict") == b"alike":
            return None
        notes: dict[str, list[int]] = {}
        for rank in self.ranks[:_MOST_NOTES]:
            notes.setdefault(self._store.get(f"{question} rank {rank}").decode(), []).append(rank)
        rendezvous.let_all_read(
            self._store, f"{question} read", self._rank, len(self.ranks), _WAIT_FOR_READERS
        )
        return notes

    def _wait(self, key: str, patience: float, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Ask for a key until it is there; not `Store.wait`, which would keep other threads from the store."""
        until = time.monotonic() + patience
        nap = _NAP / 10
        while not self._store.check([key]):
            if time.monotonic() > until:
                return False
            meanwhile()
            time.sleep(nap)
            nap = min(10 * _NAP, 1.2 * nap)
        return True

    def _absent(self, question: str) -> list[int]:
        return [rank for rank in self.ranks if not self._store.check([f"{question} rank {rank}"])]

    def _look_for_ended(self, question: str) -> Callable[[], None]:
        """A function that raises when a rank that is waited for has ended; it looks every other second."""
        next_look = time.monotonic() + _LOOK_FOR_ENDED

        def look() -> None:
            nonlocal next_look
            if rendezvous.current is None or time.monotonic() < next_look:
                return
            next_look = time.monotonic() + _LOOK_FOR_ENDED
            absent = self._absent(question)
            if ended := [rank for rank in rendezvous.current.gone(absent, patience=0.0) if rank in absent]:
                raise self._late(question, ended)

        return look

    def _late(self, question: str, ended: list[int]) -> PeerLostError:
        if ended:
            why = f"{rendezvous.listed(ended)} {'has' if len(ended) == 1 else 'have'} ended"
        else:
            seconds = f"{self.timeout.total_seconds():g} s"
            why = f"nothing came from {rendezvous.listed(self._absent(question))} within {seconds}"
        return PeerLostError(f"rank {self._rank} of {dist.get_world_size()}: {question} cannot finish: {why}")
