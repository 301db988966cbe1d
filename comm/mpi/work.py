"""torch.distributed's handle on an operation that goes on in the background."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from xtrain.comm.mpi.progress import Operation, Progress


class MpiWork(dist.Work):
    """What every call of the process group returns."""

    def __init__(self, operation: Operation, progress: Progress) -> None:
        super().__init__()
        self._operation, self._progress = operation, progress

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Until the operation is done; a timeout of zero means the group's.

        Raises:
            BackendError: not in time, or MPI reported an error, or a rank has ended; names the operation.
        """
        seconds = timeout.total_seconds()
        self._progress.wait(self._operation, seconds if seconds > 0 else self._operation.timeout)
        return True

    def synchronize(self) -> None:
        """The same as wait: host memory has no streams."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether it is done, well or not."""
        if not self._operation.done:
            self._progress.poll()
        return self._operation.done

    def is_success(self) -> bool:
        """Whether it is done and nothing went wrong."""
        return self.is_completed() and self._operation.error is None

    def exception(self) -> BaseException | None:
        """What went wrong; None while it goes on or when it went well."""
        return self._operation.error

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """A future of the outputs, completed in the background."""
        return self._operation.future()

    def result(self) -> list[torch.Tensor]:
        """The outputs, after `wait`."""
        return self._operation.outputs

    def source_rank(self) -> int:
        """Number in the group of the rank that sent what was received."""
        return int(self._operation.source.Get_source())

    _source_rank = source_rank
