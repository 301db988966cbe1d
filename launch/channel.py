"""The launcher's end of an agent: its process (or that of ssh or srun), orders to it, and what it says, as events."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xtrain.base.errors import ConfigError
from xtrain.launch.files import lines_since
from xtrain.launch.nodes import Node

_POLITE = 5.0
"""Seconds that an agent gets to end when it is told to."""


@dataclass(frozen=True)
class Event:
    """Something that an agent has said, or `closed`: the connection to it has ended."""

    node: Node
    name: str
    about: dict[str, Any] = field(default_factory=dict)


class Channel:
    """One agent.

    Args:
        command: what starts it.
        log: file that gets what the agent, ssh or srun print.
        events: where its events go.

    Attributes:
        hello: what the agent has found on its node; None until it has said so.

    Raises:
        ConfigError: there is no such command.
    """

    def __init__(
        self,
        node: Node,
        command: list[str],
        log: Path,
        events: queue.Queue[tuple[Channel, Event]],
        environment: dict[str, str],
    ) -> None:
        self.node, self.log = node, log
        self.hello: dict[str, Any] | None = None
        self.started = self.done = self.failed = self.stopped = self.closed = False
        self._events, self._heard = events, time.monotonic()
        self._log_start = log.stat().st_size if log.exists() else 0
        self._lock = threading.Lock()
        try:
            with log.open("ab") as errors:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=environment,
                    start_new_session=True,  # a Ctrl-C in the terminal reaches the launcher alone
                )
        except FileNotFoundError:
            raise ConfigError(
                f"there is no {command[0]} on this machine: install it, or correct cluster.ssh.command, cluster.python"
            ) from None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._heard = time.monotonic()
            try:
                about = json.loads(line)
                name = about.pop("event")
            except (ValueError, KeyError, AttributeError):
                # A login script's greeting, say.
                with self.log.open("ab") as log:
                    log.write(line)
                continue
            if name == "hello":
                self.hello = about
            self._events.put((self, Event(self.node, name, about)))
        code = self.process.wait()
        self.closed = True
        self._events.put((self, Event(self.node, "closed", {"code": code})))

    @property
    def ended(self) -> bool:
        """Whether its ranks, or the agent itself, have ended."""
        return self.done or self.failed or self.closed

    @property
    def silent(self) -> float:
        """Seconds since it has said anything."""
        return time.monotonic() - self._heard

    def order(self, what: str, **about: Any) -> None:
        """Tell the agent to do something; one that has gone is told elsewhere."""
        self._write({"do": what, **about})

    def introduce(self, **about: Any) -> None:
        """The first line."""
        self._write(about)

    def _write(self, about: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with (
            self._lock,
            suppress(BrokenPipeError, ValueError),
        ):  # ValueError: closed, because the agent is being ended
            self.process.stdin.write(json.dumps(about).encode() + b"\n")
            self.process.stdin.flush()

    def printed(self) -> list[str]:
        """What ssh, srun or the agent have printed since the start."""
        return lines_since(self.log, self._log_start)

    def hang_up(self) -> None:
        """Close the connection: the agent ends itself and its ranks, if it is still there."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def end(self) -> None:
        """Make sure that this side has gone; waits for the agent's end while that is to be expected."""
        self.hang_up()
        try:
            self.process.wait(timeout=_POLITE)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._thread.join(timeout=_POLITE)
