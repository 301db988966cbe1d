"""What xtrain's own process groups return: torch.distributed's handles on operations that go on in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from xtrain.comm.background import Background


class Outcome:
    """How one operation ends, well or with an error: known to waiters, and to a future where one was asked for.

    Args:
        what: name and sizes, for messages; made into text only then.
        outputs: what the future's value is.
        timeout: seconds that a wait may take.
    """

    def __init__(self, what: object, outputs: list[torch.Tensor], timeout: float) -> None:
        self.what, self.outputs, self.timeout = what, outputs, timeout
        self.done = False
        self.error: BaseException | None = None
        self.started = time.monotonic()
        self._future: Any = None  # torch types a future's exception as its value
        self._guard = threading.Lock()

    def end(self) -> None:
        """It is over, with `error` where that is set."""
        with self._guard:
            self.done = True
            future = self._future
        if future is not None:
            self._settle(future)

    def _settle(self, future: Any) -> None:
        if self.error is None:
            future.set_result(self.outputs)
        else:
            future.set_exception(self.error)

    @property
    def has_future(self) -> bool:
        """Whether somebody may wait for the future, whose wait cannot keep time itself."""
        return self._future is not None

    def future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """Completed with `outputs`, or with the error, by whichever thread ends the operation."""
        with self._guard:
            if self._future is not None:
                return self._future
            future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
            self._future, done = future, self.done
        if done:
            self._settle(future)
        return future


class BackgroundWork(dist.Work):
    """One operation."""

    def __init__(self, operation: Outcome, progress: Background) -> None:
        super().__init__()
        self._operation, self._progress = operation, progress

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Until the operation is done; a timeout of zero means the group's.

        Raises:
            BackendError: not in time, or the library reported an error, or a rank has ended; names the operation.
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


class AllWorks(dist.Work):
    """Several pieces of work, waited for together."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Until all are done."""
        for work in self._works:
            work.wait(timeout)
        return True

    def is_completed(self) -> bool:
        """Whether all are done."""
        return all(work.is_completed() for work in self._works)

    def get_future(self) -> Any:
        """A future of the outputs of all."""
        futures: list[Any] = [work.get_future() for work in self._works]
        return torch.futures.collect_all(futures).then(
            lambda done: [tensor for future in done.value() for tensor in future.value()]
        )
