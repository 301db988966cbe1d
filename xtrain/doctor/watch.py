"""Starts processes that may hang or die, follows their diaries, and says in a sentence what became of them.

Nothing waits longer than `patience` seconds for a sign of life, from when torch is imported. Imports no torch.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xtrain.base.errors import BackendError
from xtrain.doctor import event_log as diary
from xtrain.doctor.ranks import Spec
from xtrain.launch.processes import signal_name

_GRACE = 3.0
"""Seconds in which the other ranks may say what they saw when one has died."""
_STARTING = 180.0
"""Seconds that a process may take to import torch, which on a slow disk takes longer than anything after it."""
_LAUNCHERS = ("OMPI_", "PMI", "MPI_", "MV2_", "HYDRA", "HYDI", "SLURM_", "TORCHELASTIC_", "GROUP_", "ROLE_")
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Outcome:
    """What the watched processes wrote, by number, and the sentence about how they ended if not well."""

    lines: list[list[dict[str, Any]]]
    trouble: str | None = None


class Watched:
    """Processes and the files into which they write.

    Args:
        processes: one for each file, or one that has started all.
        log: what they print.
    """

    def __init__(self, processes: list[subprocess.Popen[bytes]], files: list[Path], log: Path) -> None:
        self.processes, self.files, self.log = processes, files, log

    def follow(self, patience: float) -> Outcome:
        """Until all have ended, one has died, or nobody has written anything for `patience` seconds, or `_STARTING`
        seconds at first."""
        size, moved, died = -1, time.monotonic(), None
        try:
            while True:
                written = sum(file.stat().st_size for file in self.files if file.exists())
                now = time.monotonic()
                if written != size:
                    size, moved = written, now
                codes = [process.poll() for process in self.processes]
                if all(code is not None for code in codes):
                    break
                if died is None and any(codes):
                    died = now
                if died is not None and now - died > _GRACE:
                    break
                if now - moved > patience:
                    lines = [diary.read(file) for file in self.files]
                    if now - moved > _STARTING or all(map(diary.has_started, lines)):
                        return Outcome(lines, self._hung(lines, now - moved))
                time.sleep(0.02)
            lines = [diary.read(file) for file in self.files]
            return Outcome(lines, self._ended(lines, [process.poll() for process in self.processes]))
        finally:
            self._end()

    def _end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _hung(self, lines: list[list[dict[str, Any]]], seconds: float) -> str:
        """The ranks that are furthest back are the ones that the others wait for."""
        steps = [len(one) for one in lines]
        behind = [rank for rank, count in enumerate(steps) if count == min(steps)]
        parts = [f"{_ranks(behind)} in {diary.doing(lines[behind[0]])}"]
        ahead = [rank for rank in range(len(lines)) if rank not in behind]
        if ahead:
            parts.append(f"{_ranks(ahead)} in {diary.doing(lines[ahead[0]])}")
        return f"hangs: nothing has happened for {seconds:.0f} s, with " + ", ".join(parts)

    def _ended(self, lines: list[list[dict[str, Any]]], codes: list[int | None]) -> str | None:
        if all(one and one[-1]["kind"] == "done" for one in lines) and not any(codes):
            return None
        errors = {
            rank: one[-1]["why"] for rank, one in enumerate(lines) if one and one[-1]["kind"] == "error"
        }
        if errors:  # several ranks with the same words, or the first word of many
            first = next(iter(errors))
            same = [rank for rank, why in errors.items() if why == errors[first]]
            return f"{_ranks(same)}: {errors[first]}"
        silent, how = self._dead(lines, codes)
        if silent is None:
            return f"its ranks ended {how}{self._last_words()}"
        return f"rank {silent} {how} in {diary.doing(lines[silent])}{self._last_words()}"

    def _dead(self, lines: list[list[dict[str, Any]]], codes: list[int | None]) -> tuple[int | None, str]:
        """(the rank that died, how); the rank is None where only the launcher's status is known."""
        if len(codes) == len(lines):
            bad = [(rank, code) for rank, code in enumerate(codes) if code]
            # One that a signal took comes before those that only noticed.
            rank, code = min(bad, key=lambda pair: (pair[1] > 0, pair[0])) if bad else (0, 0)
            return rank, _how(code)
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        told = re.search(r"PID (\d+) RUNNING AT.*?EXIT CODE: (\d+)", text, re.DOTALL)
        if told:
            for rank, one in enumerate(lines):
                if one and one[0].get("pid") == int(told[1]):
                    number = int(told[2])
                    return rank, _how(-number if number in set(signal.Signals) else number)
        return None, _how(codes[0] or 0)

    def _last_words(self) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        said = [line.strip() for line in text.splitlines() if line.strip(" =")]
        errors = [line for line in said if "Error" in line]
        return f": {(errors or said)[-1][:300]}" if said else ""


def _how(code: int) -> str:
    return f"was killed by {signal_name(-code)}" if code < 0 else f"ended with code {code}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _clean_environment() -> dict[str, str]:
    """Without what a launcher has said about this process."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _PLACE and not name.startswith(_LAUNCHERS)
    }
    return {"OMP_NUM_THREADS": "1", **kept}


def _start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def start_inventory(file: Path, asked: str | None, skip: dict[str, str], log: Path) -> Watched:
    """A process that asks all backends but those of `skip`."""
    environment = {**_clean_environment(), **skip}
    command = [sys.executable, "-m", "xtrain.doctor.inventory", str(file), *([asked] if asked else [])]
    return Watched([_start(command, environment, log)], [file], log)


def start_ranks(spec: Spec, ranks: int, started_by: str | None, folder: Path) -> Watched:
    """The ranks of one probe, on this host.

    Raises:
        BackendError: the program that has to start them is not there.
    """
    folder.mkdir()
    log, module = folder / "output.log", [sys.executable, "-m", "xtrain.doctor.ranks", str(folder)]
    files = [folder / f"{rank}.jsonl" for rank in range(ranks)]
    environment = _clean_environment()
    if started_by is not None:
        beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        program = shutil.which(started_by, path=beside)
        if program is None:
            raise BackendError(
                f"there is no {started_by} to start ranks with: load the cluster's MPI, or pip install 'xtrain[mpi]'"
            )
        return Watched(
            [_start([program, "-n", str(ranks), *module, spec.text()], environment, log)], files, log
        )
    spec = replace(spec, store=str(folder / "store"))
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place_text = {name: str(value) for name, value in place.items()}
        processes.append(_start([*module, spec.text()], environment | place_text, log))
    return Watched(processes, files, log)
