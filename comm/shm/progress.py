"""Operations of groups over shared memory, and how they go on.

Every group does one operation after the other, in the order of the calls; operations of different groups go on side
by side, so that ranks may call them in different orders. An operation is a generator that yields while it waits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

import torch

from xtrain.base.errors import BackendError, PeerLostError
from xtrain.comm.background import LONGEST_NAP, Background
from xtrain.comm.meeting import told_absent
from xtrain.comm.work import Outcome

_SPIN = 0.00002
"""Seconds that a waiter only looks before it begins to sleep between its looks."""
_LONGEST_DOZE = 0.005
"""Seconds that a waiter sleeps for its own group, while another thread may begin something in another one."""
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
        kind = type(error) if isinstance(error, BackendError) else BackendError
        self.error = kind(f"{self.what}: {error}")
        self._after = []
        self.end()


class Lane:
    """The operations of one group, in order.

    Args:
        lost: why the running operation can never end; None while it can.
        absent: the ranks of this host that have not come to where it waits.
        doze: sleep until it may go on, but not longer than some seconds.
        failed: called with the error of the first one that fails; all that follow fail as well.
    """

    def __init__(
        self,
        lost: Callable[[], str | None],
        absent: Callable[[], list[int]],
        doze: Callable[[float], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.queue: deque[Operation] = deque()
        self.lost, self.absent, self.doze, self._failed = lost, absent, doze, failed

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


class Progress(Background):
    """All operations of this process that have not finished."""

    def __init__(self) -> None:
        super().__init__("xtrain-shm-progress", _LOOK, _LOOK)
        self._lanes: list[Lane] = []  # those with operations

    def operations(self) -> list[Operation]:
        with self.lock:
            return [operation for lane in self._lanes for operation in lane.queue]

    def busy(self) -> bool:
        return bool(self._lanes)

    def submit(self, lane: Lane, operation: Operation, background: bool) -> None:
        """Begin an operation, at once if it is the lane's first; `background`: nobody may wait for it soon."""
        with self.lock:
            lane.queue.append(operation)
            if len(lane.queue) == 1:
                lane.advance()
            if lane.queue and lane not in self._lanes:
                self._lanes.append(lane)
        if background and not operation.done:
            self.wake()

    def poll(self) -> bool:
        some = False
        with self.lock:
            for lane in self._lanes:
                some |= lane.advance()
            if some:
                self._lanes = [lane for lane in self._lanes if lane.queue]
        return some

    def rest(self, waited: float) -> None:
        """Sleep until the rank comes that is waited for; not long where other groups have to go on, too."""
        if waited < _SPIN:
            return
        lanes = self._lanes
        if len(lanes) == 1:
            lanes[0].doze(_LONGEST_DOZE)
        else:
            time.sleep(LONGEST_NAP / 4)

    def give_up(self, operation: Operation, reason: str) -> None:
        with self.lock:
            for lane in self._lanes:
                if operation in lane.queue:
                    lane.give_up(PeerLostError(reason))
            self._lanes = [lane for lane in self._lanes if lane.queue]

    def late(self, operation: Operation) -> str:
        with self.lock:
            absent = next((lane.absent() for lane in self._lanes if operation in lane.queue), [])
        return (
            told_absent(dict.fromkeys(absent, ""))
            if absent
            else "a rank of another host has not come, or is stuck"
        )

    def ask(self, operation: Operation, waited: float) -> None:
        self._ask_all()

    def ask_for_futures(self, now: float) -> None:
        self._ask_all()

    def _ask_all(self) -> None:
        """Give up what can never end."""
        with self.lock:
            for lane in self._lanes:
                if lane.lost() is not None:
                    lane.advance()  # what the rank had done before it went may be enough
                    reason = lane.lost()
                    if lane.queue and reason is not None:
                        lane.give_up(PeerLostError(reason))
            self._lanes = [lane for lane in self._lanes if lane.queue]


progress = Progress()
"""Of this process."""
