"""The doctor under torchrun, mpiexec or srun: the processes that it is in are the ranks, and rank 0 reports."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xtrain.base.errors import XtrainError
from xtrain.doctor import event_log as diary
from xtrain.doctor import local, ranks, report
from xtrain.doctor.watch import Outcome

_SIGNS = (
    "RANK", "WORLD_SIZE", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_STEP_ID",
)  # fmt: skip
Print = Callable[[dict[str, Any]], None]


def is_one_of_several() -> bool:
    """Whether a launcher has started this process as one of several ranks."""
    if not any(name in os.environ for name in _SIGNS):
        return False
    from xtrain.comm import discovery

    place = discovery.discover(os.environ)
    return place is not None and place.world_size > 1


class _Watchdog:
    """Ends this process when its diary stands still: a library that hangs cannot be interrupted from Python."""

    def __init__(self, file: Path, patience: float, give_up: Callable[[str], None]) -> None:
        self._file, self._patience, self._give_up = file, patience, give_up
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="xtrain-doctor-watchdog").start()

    def _watch(self) -> None:
        size, moved = -1, time.monotonic()
        while not self._over.wait(0.1):
            written = self._file.stat().st_size
            if written != size:
                size, moved = written, time.monotonic()
            elif time.monotonic() - moved > self._patience:
                what = diary.doing(diary.read(self._file))
                self._give_up(f"hangs: nothing has happened for {self._patience:g} s in {what}")
                os._exit(1)

    def stop(self) -> None:
        """Nothing hangs any more."""
        self._over.set()


def examine(
    asked: str | None, quick: bool, wanted: list[str], patience: float, show: Print
) -> dict[str, Any] | None:
    """The report, on rank 0; None on the others. Collective over the ranks.

    Args:
        show: prints a report, for the case that this process must be ended.
    """
    from xtrain.comm import discovery

    place = discovery.discover(os.environ)
    assert place is not None
    with tempfile.TemporaryDirectory(prefix="xtrain-doctor-") as name:
        folder = Path(name)
        found = local.inventory(asked, patience, folder) if place.rank == 0 else None
        file = folder / "rank.jsonl"
        book = diary.Diary(file)
        book.write("started", pid=os.getpid())
        backend_name, library, trouble = _choice(asked, wanted)

        def finished(outcome: Outcome) -> dict[str, Any]:
            assert found is not None
            probes = []
            backend = next((one for one in found["backends"] if one["name"] == backend_name), None)
            if backend is not None and library is not None:
                probes.append(report.probe_entry(backend, library, place.world_size, outcome))
            return report.finish({**found, "probes": probes})

        def give_up(why: str) -> None:
            if found is not None:
                show(finished(Outcome([diary.read(file)], f"rank 0 {why}")))
            else:
                print(f"xtrain: doctor, rank {place.rank}: {why}", file=sys.stderr, flush=True)

        # The other ranks wait for rank 0, which asks every backend first; it is the one to speak.
        waiting = patience if place.rank == 0 else 2 * patience + 30
        watchdog = _Watchdog(file, waiting, give_up)
        lines = [diary.read(file)]
        if trouble is None and backend_name is not None and library is not None:
            try:
                ranks.probe(ranks.Spec(backend_name, library, not quick, patience), book)
                lines = _gathered(diary.read(file))
            except Exception as error:  # a driver's or a library's
                trouble = f"rank {place.rank}: {ranks.sentence(error)}"
                lines = [diary.read(file)]
        watchdog.stop()
        return finished(Outcome(lines, trouble)) if found is not None else None


def _choice(asked: str | None, wanted: list[str]) -> tuple[str | None, str | None, str | None]:
    """(backend, library, why not)."""
    from xtrain.backends import registry

    try:
        backend = registry.detect(asked)
    except XtrainError as error:
        return None, None, str(error)
    return backend.name, wanted[0] if wanted else backend.collectives.process_group_backend, None


def _gathered(mine: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    from xtrain import comm

    everyone: list[Any] = [None] * comm.get_world_size()
    comm.all_gather_object(everyone, mine)
    comm.destroy_process_group()
    return everyone
