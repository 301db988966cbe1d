"""Operations that MPI works on, and asking MPI to go on with them.

Every MPI call of this package is made under one lock and returns at once (but for making a communicator, once its
ranks have met), so MPI_THREAD_SERIALIZED is enough and no operation can hold up another
(docs/decisions/0005-mpi-process-group.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mpi4py import MPI

from xtrain.base.errors import BackendError, PeerLostError
from xtrain.comm.background import LONGEST_NAP, Background
from xtrain.comm.mpi.calls import Check
from xtrain.comm.work import Outcome

_SPIN = 0.010
"""Seconds that a waiter only yields before it begins to sleep between its looks."""
_CHECKED_EVERY = 16
"""Looks at an operation between two at whether the ranks make the same call; whoever ends it looks in any case."""
_LOOK = 1.0
"""Seconds of waiting between two questions whether a rank has ended."""


class Operation(Outcome):
    """One call in the hands of MPI: its requests, the memory they use, and what follows.

    Args:
        what: name and sizes, for messages.
        requests: done when all of them are.
        keep: tensors that MPI reads and writes.
        after: copies and divisions that follow, in order.
        outputs: what the future's value is.
        timeout: seconds that a wait may take.
        lost: given the seconds of waiting so far, says why the operation can never end; None while it can.
        failed: called with the error when it fails.
        check: whether all ranks make this call; None for messages.
        differing: says, after a while, which ranks make which calls.
        absent: says, after a while, which ranks have not come.

    `source` is MPI's status of a single request: who sent what was received.
    """

    def __init__(
        self,
        what: str,
        requests: list[Any],
        keep: Sequence[Any],
        after: Sequence[Callable[[], Any]],
        outputs: list[torch.Tensor],
        timeout: float,
        lost: Callable[[float], str | None],
        failed: Callable[[BaseException], None],
        check: Check | None,
        differing: Callable[[], str],
        absent: Callable[[], str],
    ) -> None:
        super().__init__(what, outputs, timeout)
        self.lost, self.absent = lost, absent
        self._check, self._differing = check, differing
        self._trouble: MPI.Exception | None = None
        self._tests = 0
        self.source = MPI.Status()
        self._requests = requests if check is None else [check.request, *requests]
        self._keep, self._after, self._failed = keep, after, failed

    def test(self) -> bool:
        """Let MPI go on; whether it has finished (or failed, or never will). Called under the lock of the progress."""
        self._tests += 1
        if self._tests % _CHECKED_EVERY == 0 and self.differs:
            return True
        try:
            if self._trouble is None and not self._moved():
                return False
        except MPI.Exception as error:
            self._trouble = error
        if self._check is not None and not self._check.test():
            return False
        if self._trouble is not None and not self.differs:
            self.error = BackendError(f"{self.what} failed in MPI: {self._trouble}")
        return True

    def _moved(self) -> bool:
        if len(self._requests) == 1:
            return bool(self._requests[0].Test(self.source))
        return bool(MPI.Request.Testall(self._requests))

    @property
    def differs(self) -> bool:
        """Whether other ranks are known to make another call: MPI may never end this one."""
        return self._check is not None and self._check.test() and not self._check.agreed

    def finish_differing(self) -> None:
        """Fail, and say who calls what. MPI may still write into the buffers, so they stay alive."""
        self.fail(
            BackendError(f"{self.what}: the ranks of a group make different calls: {self._differing()}")
        )

    def held(self) -> bool:
        """Whether MPI still holds it after it was given up."""
        try:
            return not self._moved()
        except MPI.Exception:
            return False

    def finish(self) -> None:
        """What follows after MPI's part; then the operation is done."""
        if self.error is None:
            try:
                with torch.no_grad():
                    for step in self._after:
                        step()
            except Exception as error:  # the waiter must see it, whatever thread this is
                self.error = error
        self._conclude()

    def fail(self, error: BaseException) -> None:
        """Give up. MPI may still write into the buffers, so they stay alive."""
        self.error = error
        self._conclude(release=False)

    def _conclude(self, release: bool = True) -> None:
        if self.error is not None:
            self._failed(self.error)
        if release:
            self._keep, self._after, self._requests = [], [], []
        self.end()


class Progress(Background):
    """All operations of this process that have not finished."""

    def __init__(self) -> None:
        super().__init__("xtrain-mpi-progress", _LOOK, _LOOK / 4)
        self._pending: list[Operation] = []
        self._stuck: list[Operation] = []

    def operations(self) -> list[Operation]:
        with self.lock:
            return list(self._pending)

    def busy(self) -> bool:
        return bool(self._pending)

    def incomplete(self) -> int:
        """How many operations MPI still holds, those that were given up included."""
        self.poll()
        with self.lock:
            self._stuck = [operation for operation in self._stuck if operation.held()]
            return len(self._pending) + len(self._stuck)

    def submit(self, operation: Operation) -> None:
        """Follow an operation from now on."""
        with self.lock:
            self._pending.append(operation)
        self.wake()

    def poll(self) -> bool:
        with self.lock:
            ready = [operation for operation in self._pending if operation.test()]
            if ready:
                self._pending = [operation for operation in self._pending if operation not in ready]
                self._stuck += [operation for operation in ready if operation.differs]
        for operation in ready:
            if operation.differs:
                operation.finish_differing()
            else:
                operation.finish()
        return bool(ready)

    def rest(self, waited: float) -> None:
        time.sleep(0 if waited < _SPIN else min(LONGEST_NAP, waited / 100))

    def give_up(self, operation: Operation, reason: str) -> None:
        with self.lock:
            ours = operation in self._pending
            if ours:
                self._pending.remove(operation)
                self._stuck.append(operation)
        if not ours:  # another thread has seen it end at the last moment
            while not operation.done:
                time.sleep(0)
            return
        operation.fail(PeerLostError(f"{operation.what} {reason}"))

    def complete(self, requests: list[Any], timeout: float) -> list[bool]:
        """Go on with everything until these requests are done; which of them are when time is up."""
        done = [False] * len(requests)
        begun = time.monotonic()
        while True:
            with self.lock:
                done = [was or bool(request.Test()) for was, request in zip(done, requests, strict=True)]
            waited = time.monotonic() - begun
            if all(done) or waited > timeout:
                return done
            self.poll()
            self.rest(waited)

    def late(self, operation: Operation) -> str:
        return operation.absent()

    def ask(self, operation: Operation, waited: float) -> None:
        try:
            reason = operation.lost(waited)
        except BackendError:
            return  # rank 0 is too busy to say who has ended: nothing is known
        if reason is not None:
            self.give_up(operation, f"cannot finish: {reason}")

    def ask_for_futures(self, now: float) -> None:
        for operation in self.operations():
            if operation.has_future and now - operation.started > _LOOK:
                self.ask(operation, now - operation.started)
