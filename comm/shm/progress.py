"""Who makes the operations go on: waiters, and a thread in the background.

Every group does one operation after the other, in the order of the calls; operations of different groups go on side
by side, so that ranks may call them in different orders. An operation is a generator that yields while it waits.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch

from xtrain.comm.work import Outcome
from xtrain.errors import BackendError

_SPIN = 0.00002
"""Seconds that a waiter only looks before it begins to sleep between its looks."""
_LONGEST_NAP = 0.001
_LONGEST_DOZE = 0.005
"""Seconds that a waiter sleeps for its own group, while another thread may begin something in another one."""
_LINGER = 0.5
"""Seconds without operations after which the thread sleeps until there is one."""
_LOOK = 0.2
"""Seconds of waiting between two questions whether a rank is gone."""


_OVER = object()


class Operation(Outcome):
    """One call: its steps, and what it keeps alive.

    Args:
        what, outputs, timeout: see `Outcome`.
        steps: do it, yielding while they wait.
        after: copies that follow, in order.
    """

    def __init__(
        self,
        what: object,
        steps: Iterator[None],
        after: list[Callable[[], object]],
        outputs: list[torch.Tensor],
        timeout: float,
    ) -> None:
        super().__init__(what, outputs, timeout)
        self._steps, self._after = steps, after

    def go_on(self) -> bool:
        """As far as it goes without waiting; whether it is over."""
        try:
            with torch.no_grad():
                if next(self._steps, _OVER) is not _OVER:
                    return False
                for step in self._after:
                    step()
        except Exception as error:  # the waiter must see it, whatever thread this is
            self.fail(error)
        else:
            self._after = []
            self.end()
        return True

    def fail(self, error: BaseException) -> None:
        """Give up."""
        self.error = BackendError(f"{self.what}: {error}")
        self._after = []
        self.end()


class Lane:
    """The operations of one group, in order.

    Args:
        lost: why the running operation can never end; None while it can.
        doze: sleep until it may go on, but not longer than some seconds.
        failed: called with the error of the first one that fails; all that follow fail as well.
    """

    def __init__(
        self,
        lost: Callable[[], str | None],
        doze: Callable[[float], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.queue: deque[Operation] = deque()
        self.lost, self.doze, self._failed = lost, doze, failed

    def advance(self) -> bool:
        """Go on with the first one, and the next when it is over; whether any is. Called under the lock."""
        some = False
        while self.queue and self.queue[0].go_on():
            some = True
            error = self.queue.popleft().error
            if error is not None:
                self.give_up(error)
        return some

    def give_up(self, error: BaseException) -> None:
        """Fail everything: the ranks are not in step any more. Called under the lock."""
        self._failed(error)
        waiting, self.queue = list(self.queue), deque()
        for operation in waiting:
            operation.fail(error)


class Progress:
    """All operations of this process that have not finished."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._lanes: list[Lane] = []  # those with operations
        self._arrived = threading.Condition()
        self._waiters = 0
        self._asleep = False
        self._thread: threading.Thread | None = None

    def submit(self, lane: Lane, operation: Operation, background: bool) -> None:
        """Begin an operation, at once if it is the lane's first; `background`: nobody may wait for it soon."""
        with self.lock:
            lane.queue.append(operation)
            if len(lane.queue) == 1:
                lane.advance()
            if lane.queue and lane not in self._lanes:
                self._lanes.append(lane)
        if background and not operation.done:
            self._wake()

    def _wake(self) -> None:
        with self._arrived:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="xtrain-shm-progress", daemon=True)
                self._thread.start()
            elif self._asleep:
                self._arrived.notify()

    def poll(self) -> bool:
        """Go on with everything; whether something has finished."""
        some = False
        with self.lock:
            for lane in self._lanes:
                some |= lane.advance()
            if some:
                self._lanes = [lane for lane in self._lanes if lane.queue]
        return some

    def wait(self, operation: Operation, timeout: float) -> None:
        """Until the operation is done.

        Raises:
            BackendError: not within `timeout` seconds, or a rank is gone or has given up.
        """
        if not operation.done:
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
            if waited < _SPIN:
                continue
            if waited > timeout:
                self._give_up(
                    operation, f"did not finish within {timeout:g} s: a rank did not join in or is stuck"
                )
                return
            if waited > look:
                look = waited + _LOOK
                self._ask()
            self._doze()

    def _doze(self) -> None:
        """Sleep until the rank comes that is waited for; not long where other groups have to go on, too."""
        lanes = self._lanes
        if len(lanes) == 1:
            lanes[0].doze(_LONGEST_DOZE)
        else:
            time.sleep(_LONGEST_NAP / 4)

    def _give_up(self, operation: Operation, reason: str) -> None:
        with self.lock:
            for lane in self._lanes:
                if operation in lane.queue:
                    lane.give_up(BackendError(reason))
            self._lanes = [lane for lane in self._lanes if lane.queue]

    def _ask(self) -> None:
        """Give up what can never end."""
        with self.lock:
            for lane in self._lanes:
                if lane.lost() is not None:
                    lane.advance()  # what the rank had done before it went may be enough
                    reason = lane.lost()
                    if lane.queue and reason is not None:
                        lane.give_up(BackendError(reason))
            self._lanes = [lane for lane in self._lanes if lane.queue]

    def _run(self) -> None:
        """The thread in the background: for overlap with computation, and for futures that nobody polls."""
        nap, busy, look = 0.0, time.monotonic(), 0.0
        while True:
            now = time.monotonic()
            if not self._lanes:
                # Falling asleep at once would cost every short collective a wake-up and a switch of threads.
                if now - busy > _LINGER:
                    self._sleep()
                    busy = time.monotonic()
                else:
                    time.sleep(_LONGEST_NAP)
                nap = 0.0
                continue
            busy = now
            if self._waiters > 0:  # a waiter polls everything already
                time.sleep(_LONGEST_NAP)
            else:
                nap = 0.0 if self.poll() else min(_LONGEST_NAP / 2, nap + 0.00002)
                time.sleep(nap)
            if now > look:
                look = now + _LOOK
                self._ask()
                self._expire(now)

    def _sleep(self) -> None:
        with self._arrived:
            self._asleep = True
            while not self._lanes:
                self._arrived.wait()
            self._asleep = False

    def _expire(self, now: float) -> None:
        """Futures cannot keep time themselves."""
        with self.lock:
            late = [
                operation
                for lane in self._lanes
                for operation in lane.queue
                if operation.has_future and now - operation.started > operation.timeout
            ]
        for operation in late:
            self._give_up(operation, f"did not finish within {operation.timeout:g} s")


progress = Progress()
"""Of this process."""
