"""What the ranks of one group on one host share: for each a page of numbers and four slots for data.

Ranks go through numbered steps together: whoever has done his part of step s says so, and goes on when all have.
What is written in a step is read in the next one, and written over in the one after it, so that two slots of a kind
(chosen by the step's parity) need no other locks. Does not know what the data are.
"""

from __future__ import annotations

import platform
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from xtrain.comm.shm import arena, sleep
from xtrain.comm.shm.arena import PAGE, Address

SLOT = 2**20
"""Bytes of a slot: what is copied in one step stays in the processor's cache until the others have read it."""

_FAILED, _CLOSED, _CALL, _TEXT = (
    64,
    72,
    128,
    1024,
)  # places in the page; what is written often has a cache line of its own
_CALL_SIZE = 64
_STORES_IN_ORDER = platform.machine() in ("x86_64", "AMD64", "i686")


class Call(NamedTuple):
    """What a rank is about to do, so that the others notice if they do something else.

    Attributes:
        code: which operation.
        kind: which reduction; which root.
        dtype: number of the dtype.
        elements: where all ranks have the same number of them.
        place: offset of the rank's own buffer in its arena; -1: it is not there.
        rounds: how many slots full of data this rank needs.
    """

    code: int
    kind: int
    dtype: int
    elements: int
    place: int
    rounds: int

    @property
    def agreed(self) -> tuple[int, ...]:
        """What all ranks must agree on."""
        return self[:4]


def address_of(page: memoryview) -> int:
    """Where a page lies in this process."""
    return int(np.frombuffer(page, dtype=np.uint8).ctypes.data)


_PACKED = struct.Struct("6q")


@dataclass(frozen=True)
class Member:
    """A rank of the group on this host: its number in the world, its arena, and its block's place there."""

    rank: int
    address: Address
    offset: int


class Block:
    """This rank's page and slots, in its own arena."""

    def __init__(self) -> None:
        self.arena = arena.own()
        self._memory = self.arena.take(PAGE + 4 * SLOT)
        self.address, self.offset = self.arena.address, self.arena.offset_of_block(self._memory)
        self.page = self._memory[:PAGE].data
        self.slots = torch.from_numpy(self._memory[PAGE:])


class Window:
    """All members' blocks.

    Args:
        block: this rank's.
        members: all of them in the group's order, this rank included.
        me: this rank's position among them.
    """

    def __init__(self, block: Block, members: Sequence[Member], me: int) -> None:
        self.members, self.me, self.size, self.step = members, me, len(members), 0
        self._block = block  # its memory lives as long as this object
        self._arenas = [None if i == me else arena.peer(one.address) for i, one in enumerate(members)]
        pages, slots = [], []
        for member, theirs in zip(members, self._arenas, strict=True):
            if theirs is None:
                pages.append(block.page)
                slots.append(block.slots)
            else:
                pages.append(theirs.buffer(member.offset, PAGE))
                slots.append(theirs.bytes[member.offset + PAGE : member.offset + PAGE + 4 * SLOT])
        self._pages = pages
        self._numbers = [page.cast("q") for page in pages]
        # The low half of the step, on which others sleep.
        self._words = [address_of(page) + 4 * (sys.byteorder == "big") for page in pages]
        self._mine = self._numbers[me]
        self._others = [page for i, page in enumerate(self._numbers) if i != me]
        self._slots = [[whole[i * SLOT : (i + 1) * SLOT] for i in range(4)] for whole in slots]
        self._typed: dict[torch.dtype, list[list[torch.Tensor]]] = {}
        self._fence = threading.Lock()
        _open.add(self)

    # Data.

    def _as(self, dtype: torch.dtype) -> list[list[torch.Tensor]]:
        found = self._typed.get(dtype)
        if found is None:
            found = self._typed[dtype] = [[slot.view(dtype) for slot in slots] for slots in self._slots]
        return found

    def written(self, dtype: torch.dtype, result: bool = False) -> torch.Tensor:
        """This rank's slot (for inputs or for results) to write in the current step."""
        return self._as(dtype)[self.me][2 * result + (self.step + 1) % 2]

    def read(self, member: int, dtype: torch.dtype, result: bool = False) -> torch.Tensor:
        """What a member wrote in the step that all have finished last."""
        return self._as(dtype)[member][2 * result + self.step % 2]

    def in_place(self, member: int, offset: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A member's own buffer in its arena (not this rank's)."""
        theirs = self._arenas[member]
        assert theirs is not None
        return theirs.bytes[offset : offset + elements * dtype.itemsize].view(dtype)

    def offset_of(self, flat: torch.Tensor) -> int:
        """Where a tensor of this rank lies for the others, in bytes; -1: they cannot reach it."""
        return self._block.arena.offset_of(flat)

    # Steps.

    def barrier(self) -> Iterator[None]:
        """Finish a step; yields until all have."""
        self.step += 1
        if (
            not _STORES_IN_ORDER
        ):  # two turns of a lock: the data are seen before the number, whatever the processor
            for _ in range(2):
                with self._fence:
                    pass
        step = self._mine[0] = self.step
        sleep.wake(self._words[self.me])
        for page in self._others:
            while page[0] < step:
                yield
        if not _STORES_IN_ORDER:
            with self._fence:
                pass

    def doze(self, seconds: float) -> None:
        """Sleep until a rank that is missing comes, but not longer than `seconds`."""
        for numbers, word in zip(self._numbers, self._words, strict=True):
            seen = numbers[0]
            if seen < self.step:
                sleep.until_changed(word, seen, seconds)
                return

    def announce(self, call: Call) -> None:
        """Say what begins, as part of the current step."""
        _PACKED.pack_into(self._pages[self.me], _CALL + _CALL_SIZE * ((self.step + 1) % 2), *call)

    def announced(self) -> list[Call]:
        """What every member said in the step that all have finished last."""
        place = _CALL + _CALL_SIZE * (self.step % 2)
        return [Call(*_PACKED.unpack_from(page, place)) for page in self._pages]

    # Ends.

    def fail(self, reason: str) -> None:
        """Tell the others that this rank gives the group up, and why."""
        text = reason.encode()[: PAGE - _TEXT - 1] + b"\0"
        self._pages[self.me][_TEXT : _TEXT + len(text)] = text
        self._mine[_FAILED // 8] = 1
        sleep.wake(self._words[self.me])

    def absent(self) -> list[int]:
        """Which ranks have not finished the current step."""
        return [
            member.rank
            for member, page in zip(self.members, self._numbers, strict=True)
            if page[0] < self.step
        ]

    def lost(self) -> str | None:
        """Why the current step can never end; None while it can."""
        missing = [i for i, page in enumerate(self._numbers) if page[0] < self.step]
        for i in missing:
            theirs = self._arenas[i]
            how = theirs.gone() if theirs is not None else None
            if how is None and self._numbers[i][_CLOSED // 8]:
                how = "has destroyed the group"
            if how is not None:
                return f"rank {self.members[i].rank} {how}"
        for i in missing:
            if self._numbers[i][_FAILED // 8]:
                text = bytes(self._pages[i][_TEXT:]).partition(b"\0")[0].decode(errors="replace")
                return f"rank {self.members[i].rank} has given up: {text}"
        return None

    def close(self) -> None:
        """This rank is done with the group. Its memory is given back when the others are, too: they may still read."""
        self._mine[_CLOSED // 8] = 1
        _open.discard(self)
        _closing.append(self)
        _closing[:] = [window for window in _closing if not window.forsaken()]

    def forsaken(self) -> bool:
        """Whether nobody uses it any more."""
        return all(
            page[_CLOSED // 8] or (theirs is not None and theirs.gone())
            for page, theirs in zip(self._numbers, self._arenas, strict=True)
        )


_open: set[Window] = set()
"""Windows that must not be collected before they are closed."""
_closing: list[Window] = []
"""Those of which somebody else may still read."""
