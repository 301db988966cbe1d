"""What went wrong in which rank: written by the ranks, collected by the agents, judged by the launcher."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from xtrain.base.run_folder import LOGS
from xtrain.launch.processes import signal_name

_CONSEQUENCE = re.compile(
    r"closed by peer|reset by peer|Broken pipe|Connection refused|Timed out waiting|NCCL (communicator|watchdog)"
    r"|HCCL|cannot finish: |Connection was likely closed|Failed to recv|Stop_waiting|wait timeout",
    re.IGNORECASE,
)
"""Messages of a rank that only noticed that another one had gone."""
LAST_LINES = 5
_TAIL = 16_384
"""Bytes of a log that are looked at for its last lines."""


@dataclass(frozen=True)
class Failure:
    """One rank's end.

    Attributes:
        user_error: the sentence is meant for the user and needs no traceback.
        consequence: the rank has found out that another one is gone, and knows it.
        host: where it ran.
        lines: the last ones of its log.
    """

    rank: int
    message: str
    exit_code: int
    time: float
    user_error: bool = False
    traceback: str = ""
    consequence: bool = False
    host: str = ""
    lines: tuple[str, ...] = ()

    @property
    def is_consequence(self) -> bool:
        """Whether this rank most likely failed because another one did."""
        return self.consequence or (not self.user_error and bool(_CONSEQUENCE.search(self.message)))

    @property
    def by_signal(self) -> bool:
        """Whether a signal ended it, and it said nothing."""
        return self.exit_code < 0


def rank_log(run_dir: Path, rank: int) -> Path:
    """The log of a rank: its standard output and error."""
    return run_dir / LOGS / f"rank{rank}.log"


def _failure_file(run_dir: Path, rank: int) -> Path:
    return run_dir / LOGS / f"rank{rank}.failure.json"


def write_failure(run_dir: Path, failure: Failure) -> None:
    """Called by a rank on its way out."""
    _failure_file(run_dir, failure.rank).write_text(json.dumps(asdict(failure)))


def read_failure(run_dir: Path, rank: int) -> Failure | None:
    """What a rank has written on its way out; None when it has not."""
    path = _failure_file(run_dir, rank)
    return from_json(json.loads(path.read_text())) if path.exists() else None


def forget_failures(run_dir: Path, ranks: Iterable[int]) -> None:
    """Remove what ranks wrote in an earlier start of the run."""
    for rank in ranks:
        _failure_file(run_dir, rank).unlink(missing_ok=True)


def from_json(entry: dict[str, Any]) -> Failure:
    """A failure that came as JSON."""
    return Failure(**{**entry, "lines": tuple(entry.get("lines", ()))})


def killed(rank: int, exit_code: int) -> Failure:
    """The failure of a rank that said nothing: only the exit code is known."""
    if exit_code < 0:
        hint = " (the system may have run out of memory)" if -exit_code == signal.SIGKILL else ""
        message = f"was killed by {signal_name(-exit_code)}{hint}"
    else:
        message = f"exited with code {exit_code} without a message"
    return Failure(rank, message, exit_code, time.time())


def last_lines(log: Path, count: int = LAST_LINES) -> list[str]:
    """The last lines of a log that say something; none when there is no log."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        text = file.read().decode(errors="replace")
    return [line for line in text.rstrip().splitlines() if line.strip()][-count:]


def own_failures(run_dir: Path, exit_codes: dict[int, int], host: str) -> list[dict[str, Any]]:
    """Of the ranks that failed by themselves: what they wrote, or what their exit codes say; as JSON."""
    found = []
    for rank, code in sorted(exit_codes.items()):
        failure = read_failure(run_dir, rank) or killed(rank, code)
        lines = tuple(last_lines(rank_log(run_dir, rank)))
        found.append(asdict(replace(failure, host=host, lines=lines)))
    return found


def culprit(failures: Sequence[Failure]) -> Failure | None:
    """The failure that caused the others.

    A rank with an error of its own comes first, then one that was killed, then whoever noticed first.
    """
    own = [f for f in failures if not f.is_consequence and not f.by_signal]
    silent = [f for f in failures if f.by_signal]
    for candidates in (own, silent, failures):
        if candidates:
            return min(candidates, key=lambda failure: failure.time)
    return None
