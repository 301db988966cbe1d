"""Every group has the stated time-out, whoever made it."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import xtrain
from xtrain import comm
from xtrain.base.errors import BackendError
from xtrain.comm import timeouts
from xtrain.comm.store import Server, environment
from xtrain.parallel import ProcessGrid

SECRET = bytes(range(32))
POOL = 60.0
"""What tests/pool.py, here the script, has told init_process_group."""


def _seconds(group: Any) -> float:
    """As torch itself says it."""
    if isinstance(seconds := getattr(group, "_timeout", None), float):
        return seconds
    seconds = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return float(seconds)


def _all_groups() -> set[float]:
    return {_seconds(group) for group in dist.distributed_c10d._world.pg_map}


def _made(library: str, where: dict[str, str], minutes: str | None, seconds: float | None) -> Any:
    """Time-outs of all groups that are made under `init_distributed`, and of the store; torch's default afterwards."""
    dist.destroy_process_group()
    saved = dict(os.environ)
    os.environ.update(where, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    if minutes is not None:
        os.environ["DEEPSPEED_TIMEOUT"] = minutes
    try:
        timeout = None if seconds is None else timedelta(seconds=seconds)
        comm.init_distributed(library, verbose=False, timeout=timeout)
        dist.new_group([0, 1])
        comm.new_group([0, 1])
        ProcessGrid(tensor=2)
        comm.companion(None)
        comm.init_distributed(timeout=timedelta(seconds=1))  # it runs, with what was stated
        roll = comm.RollCall("test", [0, 1])
        found = _all_groups(), roll.timeout.total_seconds()
        special: Any = comm.new_group([0, 1], timedelta(seconds=7))
        assert _seconds(special) == 7
        dist.barrier()
        comm.destroy_process_group()
        return *found, timeouts._torchs[0] == dist.distributed_c10d.default_pg_timeout
    finally:
        os.environ.clear()
        os.environ.update(saved)


def test_all_groups_have_the_stated_timeout(ranks: Any) -> None:
    for library in ("gloo", "shm"):
        for minutes, seconds, expected in ((None, 45.0, 45.0), ("3", None, 180.0), (None, None, 600.0)):
            server = Server("127.0.0.1", SECRET)
            try:
                found = ranks(2, _made, library, environment(*server.address, SECRET), minutes, seconds)
            finally:
                server.close()
            assert found == [({expected}, expected, True)] * 2, (library, minutes, seconds)


def _handed_over(minutes: str | None) -> Any:
    """The script (the pool) has started torch.distributed, and made a group of its own."""
    dist.new_group([0, 1], timedelta(seconds=11))
    if minutes is not None:
        os.environ["DEEPSPEED_TIMEOUT"] = minutes
    try:
        grid = ProcessGrid(tensor=1)
        model = torch.nn.Linear(2, 2)
        config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
        engine, *_ = xtrain.initialize(model=model, config=config, mpu=grid)
        engine.destroy()
        return _all_groups(), comm.RollCall("test", [0, 1]).timeout.total_seconds()
    finally:
        os.environ.pop("DEEPSPEED_TIMEOUT", None)
        timeouts.forget()


def test_groups_that_a_script_hands_over_are_corrected_only_where_a_timeout_is_stated(ranks: Any) -> None:
    for groups, store in ranks(2, _handed_over, None):
        assert {11.0, POOL} <= groups
        assert 180.0 not in groups
        assert store != 180.0
    assert ranks(2, _handed_over, "3") == [({180.0}, 180.0)] * 2


def _alone(where: dict[str, str]) -> tuple[str, float]:
    """Rank 1 does not come to a collective of a group that torch's own call has made."""
    dist.destroy_process_group()
    saved = dict(os.environ)
    os.environ.update(where, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    try:
        comm.init_distributed("gloo", verbose=False, timeout=timedelta(seconds=2))
        group: Any = dist.new_group([0, 1])
        dist.barrier(group)
        begun = time.monotonic()
        if comm.get_rank() == 1:
            time.sleep(4)
            return "", 0.0
        try:
            comm.all_reduce(torch.ones(1), group=group)
        except BackendError as error:
            return str(error), time.monotonic() - begun
        return "came", 0.0
    finally:
        os.environ.clear()
        os.environ.update(saved)
        timeouts.forget()


def test_a_rank_that_does_not_come_is_not_waited_for_longer(ranks: Any) -> None:
    server = Server("127.0.0.1", SECRET)
    try:
        (told, seconds), _ = ranks(2, _alone, environment(*server.address, SECRET))
    finally:
        server.close()
    assert "rank 1" in told
    assert 2 <= seconds < 15
