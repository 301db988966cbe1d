"""What went wrong in which rank: written by the ranks and the agent, read by the launcher."""

from __future__ import annotations

import json
import re
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from xtrain.base.run_folder import LOGS
from xtrain.launch.processes import signal_name

_CONSEQUENCE = re.compile(
    r"closed by peer|reset by peer|Broken pipe|Connection refused|Timed out waiting|NCCL (communicator|watchdog)"
    r"|HCCL|cannot finish: |Connection was likely closed|Failed to recv|Stop_waiting|wait timeout",
    re.IGNORECASE,
)
"""Messages of a rank that only noticed that another one had gone."""


@dataclass(frozen=True)
class Failure:
    """One rank's end.

    Attributes:
        user_error: the sentence is meant for the user and needs no traceback.
        consequence: the rank has found out that another one is gone, and knows it.
    """

    rank: int
    message: str
    exit_code: int
    time: float
    user_error: bool = False
    traceback: str = ""
    consequence: bool = False

    @property
    def is_consequence(self) -> bool:
        """Whether this rank most likely failed because another one did."""
        return self.consequence or (not self.user_error and bool(_CONSEQUENCE.search(self.message)))


def rank_log(run_dir: Path, rank: int) -> Path:
    """The log of a rank: its standard output and error."""
    return run_dir / LOGS / f"rank{rank}.log"


def _failure_file(run_dir: Path, rank: int) -> Path:
    return run_dir / LOGS / f"rank{rank}.failure.json"


def write_failure(run_dir: Path, failure: Failure) -> None:
    """Called by a rank on its way out."""
    _failure_file(run_dir, failure.rank).write_text(json.dumps(asdict(failure)))


def killed(rank: int, exit_code: int) -> Failure:
    """The failure of a rank that said nothing: only the exit code is known."""
    if exit_code < 0:
        hint = " (the system may have run out of memory)" if -exit_code == signal.SIGKILL else ""
        message = f"was killed by {signal_name(-exit_code)}{hint}"
    else:
        message = f"exited with code {exit_code} without a message"
    return Failure(rank, message, exit_code, time.time())


def read_failures(run_dir: Path, exit_codes: dict[int, int]) -> list[Failure]:
    """All failures of a run: what ranks wrote, and ranks that only have an exit code."""
    failures = []
    for path in sorted((run_dir / LOGS).glob("rank*.failure.json")):
        failures.append(Failure(**json.loads(path.read_text())))
    spoke = {failure.rank for failure in failures}
    return failures + [killed(rank, code) for rank, code in sorted(exit_codes.items()) if rank not in spoke]


def culprit(failures: list[Failure]) -> Failure | None:
    """The failure that caused the others.

    A rank with an error of its own comes first, then one that was killed, then whoever noticed first.
    """
    own = [f for f in failures if not f.is_consequence and f.exit_code >= 0]
    silent = [f for f in failures if f.exit_code < 0 and f.exit_code != -signal.SIGTERM]
    for candidates in (own, silent, failures):
        if candidates:
            return min(candidates, key=lambda failure: failure.time)
    return None
