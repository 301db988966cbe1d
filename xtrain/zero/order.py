"""Whether all ranks gather the same: ZeRO stage 3 matches collectives by their order alone.

Ranks that run different modules (a head for images here, one for text there) would otherwise train on halves of two
parameters, or wait for each other for ever. So each gather is accompanied by one number that says what is gathered,
and what has been gathered is not used before the numbers agree; one more says that a backward has ended. They travel
with the data, at the same time: on the host this costs eight bytes a rank and no waiting. Reading a number from an
accelerator would stall it at every module; there the ranks compare a digest of all of them once an update.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from xtrain import comm
from xtrain.base.errors import BackendError, TrainingError

_END = -1
_UNITS = 24
"""Bits of a number that say which module group; those above say which of its parameters (0: all)."""


def number_of(unit: int, names: Sequence[str] = ()) -> int:
    """What stands for gathering a module group, or some of its parameters."""
    return unit | (zlib.crc32("\n".join(names).encode()) or 1) << _UNITS if names else unit


class GatherOrder:
    """Compares what the ranks of a group gather.

    Args:
        names: of the module groups, by number.
        process_group: of the gathers.
        device: of the parameters.

    Attributes:
        broken: what all ranks were told when they differed. What is on its way then may never come.
    """

    def __init__(
        self, names: Sequence[str], process_group: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        self._names = names
        self._process_group = process_group
        self._device = device
        self._alone = comm.get_world_size(process_group) == 1
        self._each = device.type == "cpu"
        self._digest = 0
        self._pending: deque[comm.NumberGather] = deque()
        self.broken: str | None = None

    def announce(self, number: int) -> Any:
        """Say what this rank is about to gather; the answer is for `compare`.

        Raises:
            TrainingError: the ranks have differed before.
        """
        self.check()
        if self._alone:
            return None
        if not self._each:
            self._digest = zlib.crc32(number.to_bytes(8, "little"), self._digest)
            return None
        announced = comm.NumberGather(number, self._process_group, self._device)
        self._pending.append(announced)
        return announced

    def compare(self, announced: Any) -> None:
        """Wait until all ranks have announced a gather, and those before it.

        Raises:
            TrainingError: on every rank, when they gather different things.
        """
        self.check()
        while announced in self._pending:
            numbers = self._pending.popleft().wait()
            if len(set(numbers)) > 1:
                self._break([self._describe(number) for number in numbers])

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Around gathers: where a library refuses those that do not match, say which modules they were for."""
        try:
            yield
        except BackendError:
            with suppress(BackendError):
                self.compare(self._pending[-1] if self._pending else None)
            raise

    def end(self) -> None:
        """A backward has ended: no rank may still be in one.

        Raises:
            TrainingError: on every rank, when some are.
        """
        self.check()
        if self._each and not self._alone:
            self.compare(self.announce(_END))

    def before_update(self) -> None:
        """The weights are about to change.

        Raises:
            TrainingError: on every rank, when they have gathered different things since the last update.
        """
        self.check()
        if self._each or self._alone:
            return
        digests = comm.NumberGather(self._digest, self._process_group, self._device).wait()
        self._digest = 0
        if len(set(digests)) > 1:
            self._break([])

    def check(self) -> None:
        """Refuse to go on after the ranks have differed."""
        if self.broken is not None:
            raise TrainingError(self.broken)

    def _describe(self, number: int) -> str:
        if number == _END:
            return "has ended its backward"
        name = self._names[number & (1 << _UNITS) - 1]
        return f"needs {'some ' if number >> _UNITS else ''}parameters of {repr(name) if name else 'the model itself'}"

    def _break(self, told: Sequence[str]) -> None:
        ranks: dict[str, list[int]] = {}
        for rank, what in enumerate(told):
            ranks.setdefault(what, []).append(rank)
        each = "; ".join(
            f"rank{'s' if len(found) > 1 else ''} {', '.join(map(str, found[:8]))}"
            f"{' …' if len(found) > 8 else ''} {what}"
            for what, found in ranks.items()
        )
        self.broken = (
            f"the ranks ran different modules, which ZeRO stage 3 cannot gather{': ' if each else ''}{each}. Nothing "
            "was updated. Let every rank run the same modules in the same order (what a rank does not need can be "
            "multiplied by zero), or make the module above them one piece with utils.set_z3_leaf_modules()"
        )
        raise TrainingError(self.broken)
