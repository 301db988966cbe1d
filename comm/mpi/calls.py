"""What every rank is about to call, compared while the call goes on: MPI itself matches calls by their order alone.

A 16-byte reduction that starts before each collective and travels beside it. A rank that saves a checkpoint while
another reduces gradients would otherwise get the other's bytes for its own, and say nothing.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import Any

from mpi4py import MPI


class Check:
    """One call of this rank against the same of the others.

    Args:
        comm: the group's communicator, on which the call itself starts next.
        told: the call in words, see `buffers.told`.
    """

    def __init__(self, comm: Any, told: str) -> None:
        self.told = told
        number = int.from_bytes(blake2b(told.encode(), digest_size=7).digest(), "little")
        # Their largest are the largest number of all ranks and minus the smallest.
        self._ends = array("q", [number, -number])
        self._known = False
        self.request: Any = comm.Iallreduce(MPI.IN_PLACE, [self._ends, 2, MPI.INT64_T], MPI.MAX)

    def test(self) -> bool:
        """Whether it is known. Called under the lock of the progress."""
        self._known = self._known or bool(self.request.Test())
        return self._known

    @property
    def agreed(self) -> bool:
        """Once it is known: whether all ranks make the same call."""
        return self._ends[0] == -self._ends[1]
