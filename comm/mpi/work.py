"""The handle on an operation in the hands of MPI."""

from __future__ import annotations

from xtrain.comm.mpi.progress import Operation, Progress
from xtrain.comm.work import BackgroundWork


class MpiWork(BackgroundWork):
    """What every call of the process group returns."""

    _operation: Operation

    def __init__(self, operation: Operation, progress: Progress) -> None:
        super().__init__(operation, progress)

    def source_rank(self) -> int:
        """Number in the group of the rank that sent what was received."""
        return int(self._operation.source.Get_source())

    _source_rank = source_rank
