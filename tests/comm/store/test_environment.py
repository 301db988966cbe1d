"""Process groups that meet at the run's store, and what listens where when they run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.comm.store.tools import SECRET, listening, not_loopback
from xtrain import comm
from xtrain.base.errors import ConfigError, PeerLostError
from xtrain.base.run_folder import STORE_SECRET_VARIABLE, STORE_VARIABLE
from xtrain.comm import groups, rendezvous
from xtrain.comm import store as run_store
from xtrain.comm.store import Server, environment

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT = timedelta(seconds=30)


@contextmanager
def _variables(**more: str) -> Iterator[None]:
    saved = dict(os.environ)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", **more)  # nothing listens at 1
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def _whole(library: str, where: dict[str, str]) -> tuple[float, list[str], str]:
    """Start a group at the run's store, twice, and use all that asks a store."""
    dist.destroy_process_group()
    with _variables(**where):
        for _ in range(2):
            comm.init_distributed(library, verbose=False, timeout=TIMEOUT)
            total = torch.tensor([float(comm.get_rank() + 1)])
            pair: Any = comm.new_group([0, 1])
            comm.all_reduce(total, group=pair)
            roll = comm.RollCall("test", [0, 1])
            assert roll.all_here("here", 20)
            notes = roll.compare("what", str(comm.get_rank()), f"note {comm.get_rank()}")
            assert notes == {"note 0": [0], "note 1": [1]}
            assert roll.timeout == TIMEOUT
            assert rendezvous.current is not None
            place = rendezvous.current.whereabouts.begin(None)
            dist.barrier()
            assert rendezvous.current.whereabouts.absent(place, [0, 1], "a test") is not None
            assert rendezvous.current.gone([0, 1], patience=0.0) == []
            dist.barrier()
            addresses = sorted(address for address, _ in not_loopback(listening(os.getpid())))
            dist.destroy_process_group()
        return total.item(), addresses, os.environ["GLOO_SOCKET_IFNAME"]


@pytest.mark.parametrize("library", ["gloo", "shm"])
def test_groups_at_the_runs_store(ranks: Any, library: str) -> None:
    server = Server("127.0.0.1", SECRET)
    try:
        where = environment(*server.address, SECRET)
        assert where == {
            STORE_VARIABLE: f"127.0.0.1:{server.address[1]}",
            STORE_SECRET_VARIABLE: SECRET.hex(),
        }
        assert ranks(2, _whole, library, where) == [(3.0, [], "lo")] * 2
    finally:
        server.close()


def _by_the_script(where: dict[str, str]) -> tuple[float, str, list[str]]:
    dist.destroy_process_group()
    handlers: Any = sys.modules["torch.distributed.rendezvous"]._rendezvous_handlers
    kept = dict(handlers)
    try:
        with _variables(**where, LOCAL_WORLD_SIZE="2"):
            run_store.serve_environment()
            run_store.serve_environment()  # a second time is as good
            for _ in range(2):
                dist.init_process_group("gloo", timeout=TIMEOUT)
                total = torch.ones(1)
                dist.all_reduce(total)
                addresses = [address for address, _ in not_loopback(listening(os.getpid()))]
                dist.destroy_process_group()
            return total.item(), os.environ["GLOO_SOCKET_IFNAME"], addresses
    finally:
        handlers.clear()
        handlers.update(kept)


def test_a_script_that_starts_torchs_group_by_itself(ranks: Any) -> None:
    server = Server("127.0.0.1", SECRET)
    try:
        assert ranks(2, _by_the_script, environment(*server.address, SECRET)) == [(2.0, "lo", [])] * 2
    finally:
        server.close()


def _of_a_chip(where: dict[str, str]) -> tuple[str, list[str], bytes]:
    """The store that a group of NCCL's would get."""
    with _variables(**where):
        rank = int(os.environ["RANK"])
        keys = dist.PrefixStore("test", run_store.from_environment(TIMEOUT))
        assert run_store.group_store(keys, "gloo", rank, 2, TIMEOUT) is keys
        assert run_store.group_store(keys, "shm", rank, 2, TIMEOUT) is keys
        store = run_store.group_store(keys, "cpu:gloo,cuda:nccl", rank, 2, TIMEOUT)
        store.set(f"rank {rank}", "1")
        store.wait(["rank 0", "rank 1"], TIMEOUT)
        assert keys.num_keys() == 1
        port = int(keys.get("port of the group's store"))
        mine = [address for address, at in listening(os.getpid()) if at == port]
        found = store.get("rank 1")
        dist.barrier()  # rank 0 keeps the store until both have read
        return type(store).__name__, mine, found


def test_a_group_of_a_chip_gets_torchs_store_on_one_address(ranks: Any) -> None:
    server = Server("127.0.0.1", SECRET)
    try:
        first, second = ranks(2, _of_a_chip, environment(*server.address, SECRET))
    finally:
        server.close()
    assert first == ("TCPStore", ["127.0.0.1"], b"1")
    assert second == ("TCPStore", [], b"1")


def test_variables_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (STORE_VARIABLE, STORE_SECRET_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    assert not run_store.is_stated()
    for call in (run_store.serve_environment, lambda: run_store.from_environment(TIMEOUT)):
        with pytest.raises(ConfigError, match="are not set"):
            call()
    monkeypatch.setenv(STORE_VARIABLE, "127.0.0.1:1")
    with pytest.raises(ConfigError, match=f"{STORE_VARIABLE} is set but {STORE_SECRET_VARIABLE} is not"):
        run_store.is_stated()
    monkeypatch.setenv(STORE_SECRET_VARIABLE, "no hex")
    with pytest.raises(ConfigError, match="is not hexadecimal") as told:
        run_store.from_environment(TIMEOUT)
    assert "no hex" not in str(told.value)
    for where in ("127.0.0.1", ":1", "host:0", "host:x"):
        monkeypatch.setenv(STORE_VARIABLE, where)
        with pytest.raises(ConfigError, match="is not host:port"):
            run_store.from_environment(TIMEOUT)


def _lost(where: dict[str, str]) -> str:
    dist.destroy_process_group()
    with _variables(**where):
        comm.init_distributed("gloo", verbose=False, timeout=TIMEOUT)
        roll = comm.RollCall("test", [0, 1])
        if comm.get_rank() == 1:
            groups._settle()
            return ""
        try:
            roll.compare("what", "mine", "note")
        except PeerLostError as error:
            return str(error)
        return "nothing"


def test_who_ended_is_named(ranks: Any) -> None:
    server = Server("127.0.0.1", SECRET)
    try:
        told, _ = ranks(2, _lost, environment(*server.address, SECRET))
    finally:
        server.close()
    assert told == "rank 0 of 2: what cannot finish: rank 1 has ended"


_RANK = """
import os, sys, torch
from xtrain import comm
comm.init_distributed("LIBRARY", verbose=False)
total = torch.ones(1)
comm.all_reduce(total, group=comm.new_group())
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("library", ["gloo", "shm"])
def test_without_a_launcher_all_listen_on_loopback_only(library: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours = ("XTRAIN_", "GLOO_", "TORCHELASTIC")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK.replace("LIBRARY", library)],
            env=clean
            | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        found = [listening(process.pid) for process in started]
        assert ("127.0.0.1", port) in found[0]
        assert all(found), "gloo listens, too"
        assert not any(map(not_loopback, found)), found
    finally:
        for process in started:
            process.communicate("\n", timeout=60)
    assert [process.returncode for process in started] == [0, 0]


def test_an_address_of_another_host_is_said(caplog: pytest.LogCaptureFixture) -> None:
    from xtrain.comm import tcp_store

    with caplog.at_level("WARNING", "xtrain"):
        assert tcp_store._listening("192.0.2.77", 0) is None
    assert "MASTER_ADDR=192.0.2.77 is no address of rank 0's host" in caplog.text
    with pytest.raises(dist.DistNetworkError, match="cannot be resolved"):
        tcp_store.open_master("no.such.host.invalid", 0, 1, TIMEOUT)


def test_one_store_twice_in_a_process() -> None:
    """torch shares a listening store of its own process; so does one that listens on one address only."""
    from xtrain.comm import tcp_store

    first = tcp_store.open_master("127.0.0.1", 0, 1, TIMEOUT)
    second = tcp_store.open_master("127.0.0.1", first.port, 1, TIMEOUT)
    first.set("a", "1")
    assert second.get("a") == b"1"
