"""Operations that MPI works on, and who asks MPI to go on with them: waiters, and a thread in the background.

Every MPI call of this package is made under one lock and returns at once (but for making a communicator, once its
ranks have met), so MPI_THREAD_SERIALIZED is enough and no operation can hold up another
(docs/decisions/0005-mpi-process-group.md).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mpi4py import MPI

from xtrain.comm.work import Outcome
from xtrain.errors import BackendError, PeerLostError

_SPIN = 0.010
"""Seconds that a waiter only yields before it begins to sleep between its looks."""
_LONGEST_NAP = 0.001
_LINGER = 0.5
"""Seconds without operations after which the thread sleeps until there is one."""
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
    ) -> None:
        super().__init__(what, outputs, timeout)
        self.lost = lost
        self.source = MPI.Status()
        self._requests, self._keep, self._after, self._failed = requests, keep, after, failed

    def test(self) -> bool:
        """Let MPI go on; whether it has finished (or failed). Called under the lock of the progress."""
        try:
            if len(self._requests) == 1:
                return bool(self._requests[0].Test(self.source))
            return bool(MPI.Request.Testall(self._requests))
        except MPI.Exception as error:
            self.error = BackendError(f"{self.what} failed in MPI: {error}")
            return True

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


class Progress:
    """All operations of this process that have not finished."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._pending: list[Operation] = []
        self._stuck: list[Operation] = []
        self._arrived = threading.Condition()
        self._waiters = 0
        self._asleep = False
        self._next_look = 0.0
        self._thread: threading.Thread | None = None

    def incomplete(self) -> int:
        """How many operations MPI still holds, those that were given up included."""
        self.poll()
        with self.lock:
            self._stuck = [operation for operation in self._stuck if not operation.test()]
            return len(self._pending) + len(self._stuck)

    def submit(self, operation: Operation) -> None:
        """Follow an operation from now on."""
        with self.lock:
            self._pending.append(operation)
        with self._arrived:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="xtrain-mpi-progress", daemon=True)
                self._thread.start()
            elif self._asleep:
                self._arrived.notify()

    def poll(self) -> bool:
        """Let MPI go on with everything; whether something has finished."""
        with self.lock:
            ready = [operation for operation in self._pending if operation.test()]
            if ready:
                self._pending = [operation for operation in self._pending if operation not in ready]
        for operation in ready:
            operation.finish()
        return bool(ready)

    def wait(self, operation: Operation, timeout: float) -> None:
        """Until the operation is done.

        Raises:
            BackendError: not within `timeout` seconds, or MPI reported an error, or a rank has ended.
        """
        with self._arrived:
            self._waiters += 1
        try:
            self._wait(operation, timeout)
        finally:
            with self._arrived:
                self._waiters -= 1
        if operation.error is not None:
            raise operation.error

    def _wait(self, operation: Operation, timeout: float) -> None:
        begun, look = time.monotonic(), _LOOK
        while True:
            self.poll()
            if operation.done:
                return
            waited = time.monotonic() - begun
            if waited > timeout:
                self._give_up(
                    operation, f"did not finish within {timeout:g} s: a rank did not join in or is stuck"
                )
                return
            if waited > look:
                look = waited + _LOOK
                if self._lost(operation, waited):
                    return
            time.sleep(0 if waited < _SPIN else min(_LONGEST_NAP, waited / 100))

    def _give_up(self, operation: Operation, reason: str) -> None:
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
            time.sleep(0 if waited < _SPIN else min(_LONGEST_NAP, waited / 100))

    def _run(self) -> None:
        """The thread in the background: for overlap with computation, and for futures that nobody polls."""
        nap, busy = 0.0, time.monotonic()
        while True:
            if not self._pending:
                # Falling asleep at once would cost every short collective a wake-up and a switch of threads.
                if time.monotonic() - busy > _LINGER:
                    self._sleep()
                    busy = time.monotonic()
                else:
                    time.sleep(_LONGEST_NAP)
                nap = 0.0
                continue
            busy = time.monotonic()
            if self._waiters > 0:  # a waiter polls everything already
                time.sleep(_LONGEST_NAP)
            elif self.poll():
                nap = 0.0
            else:
                nap = min(_LONGEST_NAP / 2, nap + 0.00002)
                time.sleep(nap)
            self._expire()

    def _sleep(self) -> None:
        with self._arrived:
            self._asleep = True
            while not self._pending:
                self._arrived.wait()
            self._asleep = False

    def _expire(self) -> None:
        """Futures cannot keep time, nor ask whether a rank has ended: that is done here."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK / 4
        for operation in [one for one in list(self._pending) if one.has_future]:
            waited = now - operation.started
            if waited > operation.timeout:
                self._give_up(operation, f"did not finish within {operation.timeout:g} s")
            elif waited > _LOOK:
                self._lost(operation, waited)

    def _lost(self, operation: Operation, waited: float) -> bool:
        """Give up an operation whose ranks cannot all take part any more."""
        try:
            reason = operation.lost(waited)
        except BackendError:
            return False  # rank 0 is too busy to say who has ended: nothing is known
        if reason is not None:
            self._give_up(operation, f"cannot finish: {reason}")
        return reason is not None
