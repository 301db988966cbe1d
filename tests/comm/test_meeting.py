"""Ranks that do not fit together, do not come, or end in the middle: one sentence on every rank, soon."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.comm.test_mpi import needs_mpi, start
from xtrain import comm
from xtrain.base.errors import BackendError, PeerLostError
from xtrain.comm import meeting
from xtrain.comm.whereabouts import Whereabouts

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 20


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _refused(libraries: list[str], port: int, seconds: float, absent: int = -1) -> tuple[str, float]:
    """What a rank is told, and after how long, when each starts the library of its number."""
    dist.destroy_process_group()
    rank = int(os.environ["RANK"])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    begun = time.monotonic()
    try:
        if rank != absent:
            comm.init_distributed(libraries[rank], verbose=False, timeout=timedelta(seconds=seconds))
    except BackendError as error:
        return str(error), time.monotonic() - begun
    finally:
        del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    return "", 0.0


def test_different_libraries_are_named_on_every_rank(ranks: Any) -> None:
    for rank, (told, seconds) in enumerate(ranks(2, _refused, ["gloo", "nccl"], _free_port(), SECONDS)):
        assert told.startswith(
            f"backend {('gloo', 'nccl')[rank]}, rank {rank} of 2: the ranks have chosen different "
        )
        assert "rank 0 gloo; rank 1 nccl" in told
        assert seconds < SECONDS / 2  # at once
    four = ranks(4, _refused, ["gloo", "nccl", "gloo", "nccl"], _free_port(), SECONDS)
    assert all("nccl" in told and "ranks 1, 3 nccl" in told for told, _ in four), four


def test_ranks_that_do_not_come_are_named(ranks: Any) -> None:
    (told, seconds), _ = ranks(2, _refused, ["gloo", "gloo"], _free_port(), 1.5, 1)
    assert told.startswith("backend gloo, rank 0 of 2: nothing came from rank 1 within 1.5 s")
    assert seconds < 8
    _, (told, _) = ranks(2, _refused, ["gloo", "gloo"], _free_port(), 1.5, 0)
    assert "backend gloo, rank 1 of 2 cannot start at 127.0.0.1:" in told
    assert "rank 0 does not listen there after 1.5 s" in told


def test_a_port_in_use_is_named(ranks: Any) -> None:
    with socket.socket() as busy:
        busy.bind(("0.0.0.0", 0))
        busy.listen()
        port = busy.getsockname()[1]
        (told, _), _ = ranks(2, _refused, ["gloo", "gloo"], port, 2, 1)
    assert told.startswith(
        f"backend gloo, rank 0 of 2 cannot start at 127.0.0.1:{port}: another program uses the port"
    )
    assert "MASTER_PORT" in told


def _chosen() -> str:
    comm.check_same("backend", "cpu")
    try:
        comm.check_same("backend", ["cpu", "sunway"][dist.get_rank()])
    except BackendError as error:
        return str(error)
    return ""


def test_a_choice_that_differs_between_ranks(ranks: Any) -> None:
    for rank, told in enumerate(ranks(2, _chosen)):
        assert told.startswith(
            f"rank {rank}: the ranks have chosen different backends: rank 0 cpu; rank 1 sunway"
        )


def _told(library: str) -> str:
    import io
    import logging

    from xtrain.base.log import logger

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        comm.tell_other_library("sunway", library)
    finally:
        logger.removeHandler(handler)
    return stream.getvalue()


def test_a_process_group_of_another_library_than_the_backends_is_told(ranks: Any) -> None:
    first, second = ranks(2, _told, "mpi")
    assert "backend 'sunway' brings mpi, but the process group is of " in first
    assert "XTRAIN_BACKEND=sunway" in first
    assert second == ""
    assert ranks(2, _told, "gloo") == ["", ""]


_DYING = """
import os, signal, sys, torch
from datetime import timedelta
from xtrain import comm
comm.init_distributed("gloo", verbose=False, timeout=timedelta(seconds=30))
total = torch.ones(1000)
comm.all_reduce(total)
if comm.get_rank() == 1:
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("the data of rank 1 are unreadable")
calls = {
    "all_reduce": lambda: comm.all_reduce(total),
    "waiting": lambda: comm.all_reduce(total, async_op=True).wait(),
    "slices": lambda: comm.SliceSum(total, None).wait(),
    "objects": lambda: comm.all_gather_object([None, None], 1),
    "lists": lambda: comm.all_gather([total.clone(), total.clone()], total),
    "message": lambda: comm.recv(total, 1),
}
for name, call in calls.items():
    try:
        call()
    except Exception as error:
        print(f"{name} {type(error).__name__} {error}", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("how", ["killed", "error"])
def test_a_peer_that_ends_inside_a_collective_is_named(how: str) -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    env = {**os.environ, **place, "PYTHONPATH": str(ROOT)}
    begun = time.monotonic()
    both = [
        subprocess.Popen(
            [sys.executable, "-c", _DYING, how],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    told = both[0].communicate(timeout=60)[0]
    both[1].communicate(timeout=60)
    assert time.monotonic() - begun < 30
    lines = dict(line.split(" ", 1) for line in told.splitlines())
    assert list(lines) == ["all_reduce", "waiting", "slices", "objects", "lists", "message"]
    sentence = r"PeerLostError backend gloo, rank 0 of 2: {} cannot finish: rank 1 has ended \(.*\)$"
    assert re.match(sentence.format(r"all_reduce of float32\[1000\]"), lines["all_reduce"])
    for line in lines.values():
        assert re.match(sentence.format(".*"), line), line


def _late(port: int, how: str) -> str:
    """Rank 0 waits for all, rank 1 in another group, rank 2 computes; what each is told."""
    dist.destroy_process_group()
    rank = int(os.environ["RANK"])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        comm.init_distributed("gloo", verbose=False, timeout=timedelta(seconds=SECONDS))
        comm.all_reduce(torch.ones(3))
        pair, limit = dist.new_group([1, 2]), timedelta(seconds=4)
        slow = dist.new_group([0, 1, 2], timeout=limit)
        total = torch.ones(999)
        calls = {
            "at once": lambda: comm.all_reduce(total, group=slow),
            "waiting": lambda: comm.all_reduce(total, group=slow, async_op=True).wait(),
            "slices": lambda: comm.SliceSum(total, slow).wait(),
            "objects": lambda: comm.all_gather_object([None] * 3, 1, group=slow),
        }
        if rank == 1:
            comm.broadcast(torch.ones(7), 2, group=pair)
        if rank == 2:
            time.sleep(10)
            comm.broadcast(torch.ones(7), 2, group=pair)
        if rank == 0:
            calls[how]()
    except PeerLostError as error:
        return str(error)
    finally:
        del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    return ""


@pytest.mark.parametrize("how", ["at once", "waiting", "slices", "objects"])
def test_a_time_out_names_who_has_not_come(ranks: Any, how: str) -> None:
    told, *rest = ranks(3, _late, _free_port(), how)
    assert rest == ["", ""]
    assert told.startswith("backend gloo, rank 0 of 3: "), told
    assert (
        "cannot finish: ranks 1, 2 have not come to it; rank 1 was last seen waiting for broadcast of float32[7] ("
        in told
    )


def test_ranks_that_have_come_are_not_accused() -> None:
    """Two wait for a third: the one whose time is up first must not name the other."""
    store = dist.HashStore()
    places = [Whereabouts(store, rank) for rank in range(3)]
    for _ in range(2):
        for each in places:
            each.begin(None)
    at = [each.begin(None) for each in places[:2]]
    number = places[1].enter(lambda: "all_reduce of float32[3]")
    time.sleep(3.5)  # it has said so by now
    assert places[0].absent(at[0], [0, 1, 2], "all_reduce of float32[3]") == {2: ""}
    places[1].leave(number)
    assert places[1].absent(at[1], [0, 1, 2], "all_reduce of float32[3]") == {2: ""}
    assert meeting.told_absent({2: ""}) == "rank 2 has not come to it"


def _other_errors() -> list[str]:
    caught = []
    for wrong in (
        lambda: comm.all_reduce(torch.ones(1, dtype=torch.int16)),
        lambda: comm.all_gather_into_tensor(torch.ones(3), torch.ones(7)),
    ):
        try:
            wrong()
        except Exception as error:
            caught.append(type(error).__name__)
    return caught


def test_errors_of_other_kinds_pass_as_they_are(ranks: Any) -> None:
    for caught in ranks(2, _other_errors):
        assert len(caught) == 2
        assert "PeerLostError" not in caught


def test_the_end_of_a_rank_on_another_host_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    first = meeting.Meeting(store, "here:1", "gloo", 0, 2)
    monkeypatch.setattr(meeting, "_host", lambda: "elsewhere")
    second = meeting.Meeting(store, "here:1", "gloo", 1, 2)
    second._store.set("rank 1", '{"library": "gloo", "by": null, "host": "elsewhere", "pid": 1}')
    assert first.gone([0, 1], patience=0.1) == []
    second.leave()
    assert first.gone([0, 1], patience=0.1) == [1]
    assert issubclass(PeerLostError, BackendError)


@needs_mpi
@pytest.mark.mpi
def test_ranks_of_mpiexec_that_choose_differently_end_with_a_sentence() -> None:
    outcome = start("tests.comm.mpi_failures", "mixed", ranks=2)
    assert outcome.returncode != 0
    assert "backend gloo, rank 0 of 2: nothing came from rank 1 within 3 s" in outcome.stdout
    assert "backend mpi, rank 1: MPI did not start within 9 s, so this process was ended" in outcome.stderr


def test_a_process_that_was_killed_does_not_run() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert meeting._runs(sleeper.pid)
    sleeper.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while meeting._runs(sleeper.pid) and time.monotonic() < deadline:
        time.sleep(0.01)  # it waits to be collected, and counts as ended
    assert not meeting._runs(sleeper.pid)
    sleeper.wait()
    assert not meeting._runs(sleeper.pid)
