"""Python stacks of the ranks of this machine: they write them into their logs when they get a signal."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from xtrain.launch.failure import rank_log
from xtrain.launch.files import text_since
from xtrain.launch.hang import frames_of
from xtrain.launch.processes import processor_seconds
from xtrain.launch.survey import STACKS_SIGNAL

_WRITING = 1.0
"""Seconds that ranks get to write."""
_BUSY = 0.3
"""Share of a processor from which on a process is at work."""
_FRAMES = 20


def ask_for_stacks(run_dir: Path, pids: Mapping[int, int]) -> tuple[dict[int, list[str]], list[int]]:
    """Have all ranks write their stacks.

    Args:
        pids: the process of each rank.

    Returns:
        Innermost frames of the ranks that could, and the ranks that use the processor.
    """
    logs = {rank: rank_log(run_dir, rank) for rank in pids}
    sizes = {rank: log.stat().st_size if log.exists() else 0 for rank, log in logs.items()}
    used = {rank: processor_seconds(pid) for rank, pid in pids.items()}
    for pid in pids.values():
        with suppress(ProcessLookupError):  # it has just ended, which is told elsewhere
            os.kill(pid, STACKS_SIGNAL)
    time.sleep(_WRITING)
    busy = [rank for rank, pid in pids.items() if processor_seconds(pid) - used[rank] > _BUSY * _WRITING]
    texts = {rank: text_since(log, sizes[rank]) for rank, log in logs.items()}
    return {rank: frames[:_FRAMES] for rank, text in texts.items() if (frames := frames_of(text))}, busy
