"""Who makes operations of xtrain's own process groups go on: waiters, and a thread in the background.

What an operation is, and how it goes on, mpi/progress.py and shm/progress.py say.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

LONGEST_NAP = 0.001
_LINGER = 0.5
"""Seconds without operations after which the thread sleeps until there is one."""


class Background(ABC):
    """All operations of this process that have not finished.

    Args:
        name: of the thread.
        look: seconds of waiting between two questions whether a rank has ended.
        rounds: seconds between two rounds of the thread over operations that nobody waits for.
    """

    def __init__(self, name: str, look: float, rounds: float) -> None:
        self.lock = threading.RLock()
        self._name, self._look_every, self._rounds = name, look, rounds
        self._arrived = threading.Condition()
        self._waiters = 0
        self._asleep = False
        self._thread: threading.Thread | None = None

    @abstractmethod
    def operations(self) -> Sequence[Any]:
        """Those that have not finished."""

    @abstractmethod
    def busy(self) -> bool:
        """Whether there are any; cheap."""

    @abstractmethod
    def poll(self) -> bool:
        """Let everything go on; whether something has finished."""

    @abstractmethod
    def ask(self, operation: Any, waited: float) -> None:
        """Give up the operation, after `waited` seconds of waiting, if its ranks cannot all take part any more."""

    @abstractmethod
    def ask_for_futures(self, now: float) -> None:
        """The same for operations that nobody waits for."""

    @abstractmethod
    def late(self, operation: Any) -> str:
        """Whom the operation still waits for when its time is up, in words; may take seconds."""

    @abstractmethod
    def give_up(self, operation: Any, reason: str) -> None:
        """End the operation with an error, unless it has just ended by itself."""

    @abstractmethod
    def rest(self, waited: float) -> None:
        """Between two looks of a waiter."""

    def wake(self) -> None:
        """An operation has come."""
        with self._arrived:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            elif self._asleep:
                self._arrived.notify()

    def wait(self, operation: Any, timeout: float) -> None:
        """Until the operation is done.

        Raises:
            BackendError: not within `timeout` seconds, or the library reported an error, or a rank has ended.
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

    def _wait(self, operation: Any, timeout: float) -> None:
        begun, look = time.monotonic(), self._look_every
        while True:
            self.poll()
            if operation.done:
                return
            waited = time.monotonic() - begun
            if waited > timeout:
                self.give_up(operation, f"did not finish within {timeout:g} s: {self.late(operation)}")
                return
            if waited > look:
                look = waited + self._look_every
                self.ask(operation, waited)
            self.rest(waited)

    def _run(self) -> None:
        """The thread: for overlap with computation, and for futures that nobody polls."""
        nap, busy, look = 0.0, time.monotonic(), 0.0
        while True:
            now = time.monotonic()
            if not self.busy():
                # Falling asleep at once would cost every short collective a wake-up and a switch of threads.
                if now - busy > _LINGER:
                    self._sleep()
                    busy = time.monotonic()
                else:
                    time.sleep(LONGEST_NAP)
                nap = 0.0
                continue
            busy = now
            if self._waiters > 0:  # a waiter polls everything already
                time.sleep(LONGEST_NAP)
            elif self.poll():
                nap = 0.0
            else:
                nap = min(LONGEST_NAP / 2, nap + 0.00002)
                time.sleep(nap)
            if now > look:
                look = now + self._rounds
                self.ask_for_futures(now)
                self._expire(now)

    def _sleep(self) -> None:
        with self._arrived:
            self._asleep = True
            while not self.busy():
                self._arrived.wait()
            self._asleep = False

    def _expire(self, now: float) -> None:
        """Futures cannot keep time themselves."""
        for operation in self.operations():
            if operation.has_future and now - operation.started > operation.timeout:
                reason = f"did not finish within {operation.timeout:g} s: {self.late(operation)}"
                self.give_up(operation, reason)
