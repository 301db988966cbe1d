"""The agent of one node: `python -m xtrain.launch.agent`. Starts the node's ranks with torchrun's agent; watches them.

The launcher sends orders to its standard input and reads what it says from its standard output, one JSON object a line:
over a pipe, ssh or srun, so that the agent opens no port for it, and nothing but the user's own login gives access.
When the launcher is gone, or has been silent for too long, the agent ends its ranks: another node may have them by now.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from xtrain.base import heartbeat
from xtrain.base.files import write_text
from xtrain.base.run_folder import CHECKPOINTS, HEARTBEAT_VARIABLE, LOGS, METRICS, SIGNALLED, STOP, STOPPED
from xtrain.launch import survey
from xtrain.launch.checkpoints import newest_tag, prune
from xtrain.launch.failure import forget_failures, own_failures
from xtrain.launch.files import new_text
from xtrain.launch.processes import process_state
from xtrain.launch.stacks import ask_for_stacks

_BEAT = 1.0
"""Seconds between two reports of how far the ranks are."""
_PREDECESSOR = 60.0
"""Seconds that an earlier agent of the same run gets to go."""


class Voice:
    """What the agent says to the launcher; from any thread."""

    def __init__(self) -> None:
        # What others print must not get between the lines: it goes to standard error, which becomes the agent's log.
        self._file: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def say(self, event: str, **about: Any) -> None:
        """One line; a launcher that is gone hears nothing, and the agent ends with its standard input."""
        with self._lock:
            try:
                self._file.write(json.dumps({"event": event, **about}) + "\n")
                self._file.flush()
            except BrokenPipeError:
                end_everything("the launcher has gone")


def end_everything(why: str) -> None:
    """End the ranks, whatever they have started, and this process."""
    print(f"agent: ends with its ranks: {why}", file=sys.stderr, flush=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


class Agent:
    """One start of the node's ranks."""

    def __init__(self, voice: Voice) -> None:
        self.voice = voice
        self.orders: queue.Queue[dict[str, Any]] = queue.Queue()
        self.pids: dict[int, int] = {}
        self._heard, self._patience = time.monotonic(), float("inf")
        self._start: dict[str, Any] = {}
        self._hearts: Path | None = None
        self._handing = threading.Lock()
        self._record_read = 0
        self._newest: str | None = None

    def listen(self) -> None:
        """A thread: orders from the launcher; those that concern running ranks are carried out here."""
        for line in sys.stdin:
            order = json.loads(line)
            self._heard = time.monotonic()
            what = order["do"]
            if what == "ping":
                self.voice.say("pong", sent=order["sent"])
            elif what == "end":
                end_everything("the launcher said so")
            elif what == "stop":
                self.stop()
            elif what == "prune":
                prune(Path(self._start["run_dir"]) / CHECKPOINTS, order["keep"])
            elif what == "stacks":
                self._write_stacks()
            else:
                self.orders.put(order)
                if what == "leave":
                    return  # the launcher hangs up now
        end_everything("the launcher has gone, or the connection to it")

    def watch(self) -> None:
        """A thread: says how far the ranks are, and ends them when the launcher has been silent for too long."""
        while True:
            time.sleep(_BEAT)
            silent = time.monotonic() - self._heard
            if silent > self._patience:
                end_everything(f"the launcher has been silent for {silent:.0f} s")
            if self.pids and self._hearts is not None:
                self.voice.say("beat", ranks=self._beats(self._hearts))
                self._hand_over()

    def _beats(self, folder: Path) -> dict[int, tuple[int, int, str]]:
        """For each rank: its step, how often it has said that it goes on, and the state of its process."""
        found = {}
        for rank, pid in self.pids.items():
            beat = heartbeat.read_beat(folder, rank)
            step, count = (-1, 0) if beat is None else (beat.step, beat.count)
            found[rank] = (step, count, process_state(pid))
        return found

    def _hand_over(self) -> None:
        """Where the launcher does not see this node's run folder: what is new of the record, and saved checkpoints."""
        if not self._start["apart"]:
            return
        run_dir = Path(self._start["run_dir"])
        with self._handing:
            if self._start["node_rank"] == 0:
                text, self._record_read = new_text(run_dir / METRICS, self._record_read)
                if text:
                    self.voice.say("record", text=text)
            tag = newest_tag(run_dir / CHECKPOINTS)
            if tag is not None and tag != self._newest:
                self._newest = tag
                self.voice.say("saved", tag=tag)

    def stop(self) -> None:
        """Let the ranks finish their step, save and leave."""
        if self._start:
            (Path(self._start["run_dir"]) / STOP).touch()

    def _write_stacks(self) -> None:
        """Every rank that can writes its Python stacks into its log; the launcher gets the innermost frames."""
        frames, busy = ask_for_stacks(Path(self._start["run_dir"]), self.pids)
        self.voice.say("stacks", ranks=frames, busy=busy)

    def on_signal(self, number: int, _: Any) -> None:
        """The node's own warning (scancel, shutdown): the ranks save; the launcher is told."""
        self.voice.say("signalled", signal=number)
        self.stop()

    def run(self) -> int:
        """Wait for the order to start, start, and say how it ended."""
        order = self.orders.get()
        server = None
        if order["do"] == "open":
            from xtrain.launch.elastic_agent import open_store

            server, addresses = open_store(order)
            self.voice.say("opened", **addresses)
            order = self.orders.get()
        self._start = order
        self._patience = order["node_timeout"]
        run_dir, ranks = (
            Path(order["run_dir"]),
            range(order["first_rank"], order["first_rank"] + order["ranks"]),
        )
        (run_dir / LOGS).mkdir(parents=True, exist_ok=True)
        for name, text in order["files"].items():
            if not (run_dir / name).is_file() or (run_dir / name).read_text() != text:
                write_text(run_dir / name, text)
        for name in (STOP, STOPPED, SIGNALLED):
            (run_dir / name).unlink(missing_ok=True)
        forget_failures(run_dir, ranks)
        _, self._record_read = new_text(run_dir / METRICS, 0)
        self._newest = newest_tag(run_dir / CHECKPOINTS)
        with tempfile.TemporaryDirectory(prefix="xtrain-", dir=survey.memory_folder()) as hearts:
            self._hearts = Path(hearts)
            order["env"][HEARTBEAT_VARIABLE] = hearts
            codes = self._train(order)
            self.pids = {}
            self._hand_over()
            if codes:
                self.voice.say("failed", failures=own_failures(run_dir, codes, order["node"]))
            else:
                signalled = run_dir / SIGNALLED
                told = json.loads(signalled.read_text()) if signalled.exists() else None
                self.voice.say("done", stopped=(run_dir / STOPPED).exists(), signalled=told)
            self.orders.get()  # to leave: others may still need the store
        if server is not None:
            server.close()
        return 0

    def _train(self, order: dict[str, Any]) -> dict[int, int]:
        from xtrain.launch.elastic_agent import run_ranks

        return run_ranks(order, self._started)

    def _started(self, pids: dict[int, int]) -> None:
        self.pids = pids
        # torchrun's agent has set handlers of its own, which would end the ranks before they can save.
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.on_signal)
        self.voice.say("started", pids=pids)


def _alone(node: str, run_dir: str) -> TextIO | None:
    """A lock that only one agent of a run holds on a node; None while an earlier one does not go."""
    name = hashlib.sha256(f"{node}:{run_dir}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"xtrain-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    file = (folder / f"{name}.lock").open("w")
    until = time.monotonic() + _PREDECESSOR
    while time.monotonic() < until:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            time.sleep(0.05)
    return None


def main() -> int:
    """Serve the launcher at the other end of the pipes."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    voice = Voice()
    introduction = json.loads(sys.stdin.readline() or "null")
    if introduction is None:
        return 1
    lock = _alone(introduction["node"], introduction["run_dir"])
    if lock is None:
        voice.say("refused", why="an earlier agent of this run is still there, and does not end")
        return 1
    voice.say("hello", **survey.report(introduction))
    agent = Agent(voice)
    for target in (agent.listen, agent.watch):
        threading.Thread(target=target, daemon=True).start()
    import xtrain.launch.elastic_agent  # noqa: F401  # torch, which takes seconds: while the launcher asks the other nodes

    return agent.run()


if __name__ == "__main__":
    status = main()
    # Threads that wait for orders need not be waited for.
    os._exit(status)
