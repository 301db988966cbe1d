"""The collectives of the ranks of one host, through a window: generators that yield while they wait for the others.

Data go through the slots in pieces, one a step, so that they are read while they are still in a cache: in one step a
rank writes piece t, works on piece t - 1, which all have written, and copies what has become of piece t - 2. A buffer
in its rank's arena is read where it lies, without a copy into a slot; its rank then waits until all have read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor

from xtrain.backends.alignment import HOST_BYTES, aligned_unit, round_up
from xtrain.base.errors import BackendError
from xtrain.comm.shm.reduction import DTYPES, Reduction
from xtrain.comm.shm.window import SLOT, Call, Window

Steps = Iterator[None]

CODES = (
    "all_reduce",
    "reduce",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "gather",
    "all_to_all",
    "scatter",
    "barrier",
)

SMALL = 2**16
"""Bytes up to which every rank adds everything itself: one step instead of two."""

_BYTES = torch.uint8


def as_bytes(flat: Tensor) -> Tensor:
    """The memory of a flat contiguous tensor."""
    return flat.view(_BYTES)


class Exchange:
    """The collectives over one window. Tensors are flat and contiguous."""

    def __init__(self, window: Window) -> None:
        self.window, self.me, self.size = window, window.me, window.size
        self._others = [member for member in range(window.size) if member != window.me]

    def doze(self, seconds: float) -> None:
        """Sleep until a rank comes that is missing, but not longer than `seconds`."""
        self.window.doze(seconds)

    # What all of them begin and end with.

    def _announce(
        self, what: str, kind: int, dtype: torch.dtype, elements: int, place: int = -1, rounds: int = 0
    ) -> None:
        number = DTYPES.index(dtype) if dtype in DTYPES else -1
        self.window.announce(Call(CODES.index(what), kind, number, elements, place, rounds))

    def _announced(self) -> list[Call]:
        """The others' calls, after the first step.

        Raises:
            BackendError: they are not the same as this rank's.
        """
        calls = self.window.announced()
        mine = calls[self.me]
        for member, call in enumerate(calls):
            if call.agreed != mine.agreed:
                ranks = [self.window.members[one].rank for one in (self.me, member)]
                raise BackendError(
                    f"the ranks of a group make different calls: rank {ranks[0]} {_told(mine)}, rank {ranks[1]} "
                    f"{_told(call)}"
                )
        return calls

    def _place(self, flat: Tensor) -> int:
        return self.window.offset_of(flat) if flat.nbytes > SMALL else -1

    def _end(self, calls: list[Call]) -> Steps:
        """Before a buffer that is read in place may change: wait until all have read."""
        if any(call.place >= 0 for call in calls):
            yield from self.window.meet()

    def barrier(self) -> Steps:
        """Nothing but waiting."""
        self._announce("barrier", 0, _BYTES, 0)
        yield from self.window.meet()
        self._announced()

    # Reductions.

    def all_reduce(self, flat: Tensor, op: Any, root: int = -1) -> Steps:
        """Reduce in place, on every rank or (with `root`) on one; the others' tensors then stay as they are."""
        reduction = Reduction(op, flat.dtype, self.size)
        what, kind = "all_reduce" if root < 0 else "reduce", 64 * (root + 1) + reduction.code
        if flat.nbytes <= SMALL:
            self._announce(what, kind, flat.dtype, len(flat))
            yield from self._reduce_at_once(flat, reduction, root in (-1, self.me))
            return
        window, dtype, per = self.window, flat.dtype, SLOT // flat.element_size()
        place = self._place(flat)
        self._announce(what, kind, dtype, len(flat), place)
        calls: list[Call] = []
        rounds = -(-len(flat) // per)
        for step in range(rounds + 2):
            if step < rounds and place < 0:
                piece, slot = flat[step * per : (step + 1) * per], window.written(dtype)
                first, last = self._part(len(piece), dtype, self.me)
                slot[:first].copy_(piece[:first])  # nobody else reads this rank's own part
                slot[last : len(piece)].copy_(piece[last:])
            if step == 1:
                calls = self._announced()
                if root < 0 and all(call.place >= 0 for call in calls):
                    yield from self._all_reduce_in_place(flat, calls, reduction)
                    return
            if 0 < step <= rounds:
                self._reduce_piece(flat, (step - 1) * per, calls, reduction, root)
            if step > 1 and root in (-1, self.me):
                self._collect_piece(flat, (step - 2) * per, calls, root)
            if step <= rounds:
                yield from window.meet()
        yield from self._end(calls)

    def _reduce_at_once(self, flat: Tensor, reduction: Reduction, wanted: bool) -> Steps:
        window, n = self.window, len(flat)
        window.written(flat.dtype)[:n].copy_(flat)
        yield from window.meet()
        self._announced()
        if wanted:
            rows = [
                flat if member == self.me else window.read(member, flat.dtype)[:n]
                for member in range(self.size)
            ]
            reduction.into(flat, rows)

    def _all_reduce_in_place(self, flat: Tensor, calls: list[Call], reduction: Reduction) -> Steps:
        """Where all buffers can be read: no slots, and three steps whatever the size."""
        dtype, per = flat.dtype, SLOT // flat.element_size()
        first, last = self._part(len(flat), dtype, self.me)
        for start in range(first, last, per):
            stop = min(start + per, last)
            rows = [
                flat[start:stop]
                if member == self.me
                else self._from(member, call.place, 0, start, stop, dtype, False)
                for member, call in enumerate(calls)
            ]
            reduction.into(rows[self.me], rows)
            yield  # other groups may have to go on
        yield from self.window.meet()
        for member in self._others:
            first, last = self._part(len(flat), dtype, member)
            for start in range(first, last, 4 * per):
                stop = min(start + 4 * per, last)
                flat[start:stop].copy_(self._from(member, calls[member].place, 0, start, stop, dtype, True))
                yield
        yield from self._end(calls)

    def _share(self, dtype: torch.dtype) -> int:
        """Elements that a slot has for each member."""
        unit = aligned_unit(HOST_BYTES, dtype)
        return SLOT // dtype.itemsize // self.size // unit * unit

    def _part(self, elements: int, dtype: torch.dtype, member: int) -> tuple[int, int]:
        """Which elements of a piece a member adds."""
        width = round_up(-(-elements // self.size), aligned_unit(HOST_BYTES, dtype))
        return min(member * width, elements), min((member + 1) * width, elements)

    def _reduce_piece(
        self, flat: Tensor, start: int, calls: list[Call], reduction: Reduction, root: int
    ) -> None:
        """Add this rank's part of a piece, and leave it where the others find it."""
        window, dtype = self.window, flat.dtype
        first, last = self._part(min(SLOT // dtype.itemsize, len(flat) - start), dtype, self.me)
        mine = flat[start + first : start + last]
        rows = [
            mine
            if member == self.me
            else self._from(member, calls[member].place, start, first, last, dtype, False)
            for member in range(self.size)
        ]
        if root < 0 and calls[self.me].place >= 0:
            reduction.into(mine, rows)
            return
        result = window.written(dtype, result=True)[first:last]
        reduction.into(result, rows)
        if root in (-1, self.me):
            mine.copy_(result)

    def _collect_piece(self, flat: Tensor, start: int, calls: list[Call], root: int) -> None:
        """Copy the parts of a piece that the others have added."""
        dtype = flat.dtype
        for member in self._others:
            first, last = self._part(min(SLOT // dtype.itemsize, len(flat) - start), dtype, member)
            place = calls[member].place if root < 0 else -1
            flat[start + first : start + last].copy_(
                self._from(member, place, start, first, last, dtype, True)
            )

    def _from(
        self, member: int, place: int, start: int, first: int, last: int, dtype: torch.dtype, result: bool
    ) -> Tensor:
        """A part of a member's piece: in its own buffer or in its slot."""
        if place < 0:
            return self.window.read(member, dtype, result)[first:last]
        return self.window.in_place(member, place + (start + first) * dtype.itemsize, last - first, dtype)

    def reduce_scatter(self, out: Tensor, flat: Tensor, counts: Sequence[int], op: Any) -> Steps:
        """Reduce consecutive pieces of counts[r] elements, the r-th into rank r's `out` (which may be that piece)."""
        window, dtype = self.window, flat.dtype
        reduction = Reduction(op, dtype, self.size)
        starts = [0, *accumulate(counts)]
        share = self._share(dtype)
        place, rounds = self._place(flat), max(1, -(-max(counts) // share))
        self._announce("reduce_scatter", reduction.code, dtype, len(flat), place)
        calls: list[Call] = []
        for step in range(rounds + 1):
            if step < rounds and place < 0:
                slot = window.written(dtype)
                for member in self._others:
                    piece = flat[starts[member] : starts[member + 1]][step * share : (step + 1) * share]
                    slot[member * share : member * share + len(piece)].copy_(piece)
            if step == 1:
                calls = self._announced()
            if step > 0:
                first = (step - 1) * share
                piece = out[first : first + share]
                at = starts[self.me] + first
                rows = [
                    flat[at : at + len(piece)]
                    if member == self.me
                    else window.read(member, dtype)[self.me * share : self.me * share + len(piece)]
                    if calls[member].place < 0
                    else window.in_place(member, calls[member].place + at * dtype.itemsize, len(piece), dtype)
                    for member in range(self.size)
                ]
                if len(piece):
                    reduction.into(piece, rows)
            if step < rounds:
                yield from window.meet()
        yield from self._end(calls)

    # Moving.

    def all_gather(self, flat: Tensor, mine: Tensor) -> Steps:
        """Every rank's `mine`, one after the other, in `flat` (of which `mine` may be this rank's piece)."""
        return self.spread(
            "all_gather", mine, flat.split(len(mine)) if len(mine) else [mine] * self.size, -1, len(flat)
        )

    def broadcast(self, flat: Tensor, root: int) -> Steps:
        """The root's tensor on every rank."""
        mine = flat if self.me == root else None
        into = [flat if member == root else None for member in range(self.size)]
        return self.spread("broadcast", mine, into, root, len(flat))

    def spread(
        self,
        what: str,
        source: Tensor | None,
        outputs: Sequence[Tensor | None],
        root: int = -1,
        elements: int = -1,
    ) -> Steps:
        """Every rank's source, whole, to all ranks that have an output for it.

        Args:
            what: all_gather, broadcast or gather.
            source: None where this rank gives nothing.
            outputs: the r-th for what comes from rank r; None where it is not wanted.
            elements: of every rank's source, where they must be equal.
        """
        window, dtype = self.window, next(one for one in (source, *outputs) if one is not None).dtype
        mine = torch.empty(0, dtype=_BYTES) if source is None else as_bytes(source)
        place = self._place(mine)
        rounds = 1 if place >= 0 else -(-len(mine) // SLOT)
        self._announce(what, root, dtype, elements, place, rounds)
        into = [None if output is None else as_bytes(output) for output in outputs]
        own = into[self.me]
        if own is not None and own.data_ptr() != mine.data_ptr():
            own.copy_(mine)
        calls: list[Call] = []
        for step in count():
            piece = mine[step * SLOT : (step + 1) * SLOT]
            if place < 0 and len(piece):
                window.written(_BYTES)[: len(piece)].copy_(piece)
            if step == 1:
                calls = self._announced()
            if step > 0:
                for member in self._others:
                    target = into[member]
                    if target is None:
                        continue
                    if calls[member].place < 0:
                        target = target[(step - 1) * SLOT : step * SLOT]
                        target.copy_(window.read(member, _BYTES)[: len(target)])
                    elif step == 1:
                        target.copy_(window.in_place(member, calls[member].place, len(target), _BYTES))
                if step >= max(call.rounds for call in calls):
                    break
            yield from window.meet()
        yield from self._end(calls)

    def deal(
        self,
        what: str,
        sources: Sequence[Tensor | None],
        outputs: Sequence[Tensor | None],
        root: int = -1,
        whole: Tensor | None = None,
    ) -> Steps:
        """The r-th source to rank r, whose output for this rank it fills.

        Args:
            what: all_to_all or scatter.
            whole: a flat tensor of which the sources are equal consecutive pieces, if they are.
        """
        window, dtype = self.window, next(one for one in (*sources, *outputs) if one is not None).dtype
        share = self._share(_BYTES)
        given = [None if source is None else as_bytes(source) for source in sources]
        into = [None if output is None else as_bytes(output) for output in outputs]
        place = -1 if whole is None else self._place(whole)
        longest = max(
            (len(one) for i, one in enumerate(given) if one is not None and i != self.me), default=0
        )
        self._announce(what, root, dtype, -1, place, 1 if place >= 0 else -(-longest // share))
        kept, own = given[self.me], into[self.me]
        if kept is not None and own is not None:
            own.copy_(kept)
        calls: list[Call] = []
        for step in count():
            if place < 0:
                slot = window.written(_BYTES)
                for member in self._others:
                    source = given[member]
                    piece = None if source is None else source[step * share : (step + 1) * share]
                    if piece is not None and len(piece):
                        slot[member * share : member * share + len(piece)].copy_(piece)
            if step == 1:
                calls = self._announced()
            if step > 0:
                for member in self._others:
                    target = into[member]
                    if target is None:
                        continue
                    if calls[member].place < 0:
                        target = target[(step - 1) * share : step * share]
                        slot = window.read(member, _BYTES)
                        target.copy_(slot[self.me * share : self.me * share + len(target)])
                    elif step == 1:
                        at = calls[member].place + self.me * len(target)
                        target.copy_(window.in_place(member, at, len(target), _BYTES))
                if step >= max(call.rounds for call in calls):
                    break
            yield from window.meet()
        yield from self._end(calls)


def _told(call: Call) -> str:
    dtype = str(DTYPES[call.dtype]).removeprefix("torch.") if call.dtype >= 0 else "another dtype"
    size = f" of {call.elements} elements" if call.elements >= 0 else ""
    return f"{CODES[call.code]} ({dtype}{size}, operation or root {call.kind})"
