"""Which collective each rank has come to, so that an error can name the ranks that have not come to it.

A rank counts the collectives that it begins in every group. While it waits long for one, a thread writes the counts
into the store where the ranks have met; nobody writes anything while all goes well.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist

_LONG = 2.0
"""Seconds of waiting after which a rank says where it is."""
_SAYING = 1.5
"""Seconds that the others get to say so when something is wrong."""
_ASKED = 512
"""Ranks of a group that are asked for at most."""

Place = tuple[str, int]
"""A group's name, and the number of a collective in it."""


class Whereabouts:
    """Of this rank, and of the others where they have told.

    Args:
        store: all ranks'.
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store, self._rank = store, rank
        self._begun: Counter[str] = Counter()
        self._waits: dict[int, tuple[float, Callable[[], str]]] = {}
        self._numbers = itertools.count()
        self._told = -1
        self._thread: threading.Thread | None = None

    def begin(self, group: Any) -> Place:
        """A collective begins."""
        name = "" if group is None or group is dist.group.WORLD else group.group_name
        self._begun[name] += 1
        return name, self._begun[name]

    def enter(self, what: Callable[[], str]) -> int:
        """This rank begins to wait; `what` says for what. Returns what `leave` takes."""
        if self._thread is None:
            # It must not keep the store of a group that has been destroyed, nor outlive it.
            self._thread = threading.Thread(
                target=_watch, args=(weakref.ref(self),), name="xtrain-whereabouts", daemon=True
            )
            self._thread.start()
        number = next(self._numbers)
        self._waits[number] = time.monotonic(), what
        return number

    def leave(self, number: int) -> None:
        """It waits no more."""
        del self._waits[number]

    def tell_if_long(self) -> None:
        """Write down where this rank is, if it has waited long."""
        now = time.monotonic()
        for number, (since, what) in list(self._waits.items()):
            if now - since > _LONG and number > self._told:
                self._told = number
                with suppress(RuntimeError):  # the store has gone with rank 0: nobody asks any more
                    self._tell(what())

    def _tell(self, where: str) -> None:
        self._store.set(f"at {self._rank}", json.dumps({"begun": self._begun, "where": where}))

    def absent(self, place: Place, ranks: Sequence[int], what: str) -> dict[int, str]:
        """Which ranks have not come to a collective that this rank waits for, and what they wait for, if anything.

        Raises:
            RuntimeError: the store does not answer.
        """
        self._tell(what)
        until = time.monotonic() + _SAYING
        while True:
            found = {}
            for rank in [rank for rank in ranks if rank != self._rank][:_ASKED]:
                begun, where = self._of(rank)
                if begun.get(place[0], 0) < place[1]:
                    found[rank] = where
            if not found or time.monotonic() > until:
                return found
            time.sleep(0.1)

    def _of(self, rank: int) -> tuple[dict[str, int], str]:
        if not self._store.check([f"at {rank}"]):
            return {}, ""
        about = json.loads(self._store.get(f"at {rank}"))
        return about["begun"], about["where"]


def _watch(reference: weakref.ref[Whereabouts]) -> None:
    while True:
        time.sleep(_LONG / 2)
        if (whereabouts := reference()) is None:
            return
        whereabouts.tell_if_long()
        del whereabouts
