"""How ranks find the store of their run: by XTRAIN_STORE and XTRAIN_STORE_SECRET, which their agent sets.

Keys carry no number of the attempt: the launcher starts a new server for each attempt, so a restarted run finds an
empty store. Starts of process groups within one attempt are told apart by `Rendezvous` and, here, by counting.

**Two stores for chips.** What holds host memory (gloo, shm) gets the run's store itself. NCCL, HCCL and their like have
C++ threads (watchdog, heartbeat) that ask their group's store at any time, also while Python ends. A thread that calls
into Python then is stopped inside C++ code, which aborts the process. So such a group gets torch's own TCPStore, which
is C++ throughout: rank 0 opens it on a free port of its MASTER_ADDR and of no other address, and tells the port through
the run's store. xtrain's own keys stay in the run's store. A TCPStore has no secret, but torch unpickles nothing from a
group's store by itself.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import _rendezvous_handlers, register_rendezvous_handler

from xtrain.backends import registry
from xtrain.base.errors import BackendError, ConfigError
from xtrain.base.run_folder import STORE_SECRET_VARIABLE, STORE_VARIABLE
from xtrain.comm import libraries, tcp_store
from xtrain.comm.store.client import RunStore

_starts = itertools.count()


def is_stated() -> bool:
    """Whether the environment names a run's store.

    Raises:
        ConfigError: one of the two variables is set, and not the other.
    """
    there = [name for name in (STORE_VARIABLE, STORE_SECRET_VARIABLE) if os.environ.get(name)]
    if len(there) == 1:
        (missing,) = {STORE_VARIABLE, STORE_SECRET_VARIABLE} - set(there)
        raise ConfigError(
            f"{there[0]} is set but {missing} is not: the launcher sets both; unset it for none"
        )
    return bool(there)


def environment(host: str, port: int, secret: bytes) -> dict[str, str]:
    """What an agent sets for its ranks: where they reach the store, and the secret in hexadecimal."""
    return {STORE_VARIABLE: f"{host}:{port}", STORE_SECRET_VARIABLE: secret.hex()}


def from_environment(timeout: timedelta) -> RunStore:
    """The run's store.

    Raises:
        ConfigError: the variables are absent or unreadable.
        BackendError, torch.distributed.DistNetworkError: see `RunStore`.
    """
    if not is_stated():
        raise ConfigError(f"{STORE_VARIABLE} and {STORE_SECRET_VARIABLE} are not set: the launcher sets them")
    host, _, port = os.environ[STORE_VARIABLE].rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"{STORE_VARIABLE}={os.environ[STORE_VARIABLE]!r} is not host:port")
    try:
        secret = bytes.fromhex(os.environ[STORE_SECRET_VARIABLE])
    except ValueError:
        raise ConfigError(f"{STORE_SECRET_VARIABLE} is not hexadecimal") from None  # and is not repeated here
    return RunStore(host, int(port), secret, timeout)


def _is_for_host_memory(library: str) -> bool:
    """Whether all parts of "gloo" or "cpu:gloo,cuda:nccl" move host memory."""
    parts = [part.rpartition(":")[2].strip().lower() for part in library.split(",")]
    return all("cpu" in libraries.devices(part) for part in parts)


def group_store(keys: dist.Store, library: str, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The store for a process group: `keys`, or a TCPStore of rank 0's whose port `keys` tell. See the module.

    Raises:
        BackendError: rank 0 cannot listen at its MASTER_ADDR, or the others do not reach it.
    """
    if _is_for_host_memory(library):
        return keys
    host = os.environ["MASTER_ADDR"]
    try:
        if rank == 0:
            store = tcp_store.open_master(host, 0, world_size, timeout)
            keys.set("port of the group's store", str(store.port))
            return store
        port = int(keys.get("port of the group's store"))
        return tcp_store.open_client(host, port, world_size, timeout)
    except RuntimeError as error:
        raise BackendError(f"rank {rank}: no store for {library} at {host}: {error}") from error


def serve_environment() -> None:
    """Make torch's `env://` meet at the run's store: for scripts that call init_process_group() by themselves.

    Replaces torch's own handler in this process.

    Raises:
        ConfigError: the variables are absent or unreadable.
    """
    if not is_stated():
        raise ConfigError(f"{STORE_VARIABLE} and {STORE_SECRET_VARIABLE} are not set: the launcher sets them")
    _rendezvous_handlers.pop("env", None)
    register_rendezvous_handler("env", _handle)


def _handle(
    url: str, timeout: timedelta = default_pg_timeout, **_: Any
) -> Iterator[tuple[dist.Store, int, int]]:
    """As torch's handlers: yields store, rank and world size, once."""
    asked = parse_qs(urlsplit(url).query)
    values = {}
    for name in ("rank", "world_size"):
        value = asked.get(name, [os.environ.get(name.upper(), "")])[0]
        if not value.isdigit():
            raise ConfigError(f"env://: {name.upper()}={value!r} is not a number: the launcher sets it")
        values[name] = int(value)
    rank, world_size = values["rank"], values["world_size"]
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        tcp_store.keep_gloo_on_this_host()
    # Ranks start their groups in the same order. The store keeps the keys of earlier starts.
    keys = dist.PrefixStore(f"env/{next(_starts)}", from_environment(timeout))
    library = registry.detect().collectives.process_group_backend
    yield group_store(keys, library, rank, world_size, timeout), rank, world_size
    raise RuntimeError("env:// at the run's store meets once for each init_process_group()")
