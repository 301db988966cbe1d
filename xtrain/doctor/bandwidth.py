"""How fast bytes move between the ranks, next to a copy in the memory that they share. All ranks at the same time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from xtrain import comm
from xtrain.comm.timing import bandwidths

SIZES = (2**16, 2**20, 2**24)
"""Bytes of a message: the whole tensor of an all-reduce, the whole result of an all-gather."""
COPIED = 2**26
_ROUNDS = 7


def _median_seconds(action: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    """Of `_ROUNDS`, after one that is not counted; the ranks begin each together."""
    times = []
    for _ in range(_ROUNDS + 1):
        comm.barrier()
        synchronize()
        begun = time.perf_counter()
        action()
        synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def measure(device: torch.device, synchronize: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """One entry for the copy and one for each collective and size: bytes, seconds, bytes per second.

    `bytes_per_second` of a collective is its bus bandwidth: what each rank sends at least, by the time.
    """
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), synchronize)
    yield {
        "operation": "memory copy",
        "bytes": COPIED,
        "seconds": seconds,
        "bytes_per_second": COPIED / seconds,
    }
    ranks = comm.get_world_size()
    for size in SIZES:
        count = size // 4 // ranks * ranks
        whole = torch.zeros(count, device=device)
        part = torch.zeros(count // ranks, device=device)
        actions: dict[str, Callable[[], Any]] = {
            "all_reduce": partial(comm.all_reduce, whole),
            "all_gather": partial(comm.all_gather_into_tensor, whole, part),
        }
        for operation, action in actions.items():
            seconds = _median_seconds(action, synchronize)
            _, bus = bandwidths(operation, whole.nbytes, ranks, 1000 * seconds)
            entry = {"operation": operation, "bytes": whole.nbytes, "seconds": seconds}
            yield {**entry, "bytes_per_second": bus * 1e9 / 8}
