"""How the ranks of a new group find each other's memory: through torch's store. Makes the group."""

from __future__ import annotations

import json
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from xtrain.base.errors import BackendError
from xtrain.comm.shm import arena
from xtrain.comm.shm.exchange import Exchange
from xtrain.comm.shm.group import ShmProcessGroup
from xtrain.comm.shm.hosts import Hosts, by_host, positions
from xtrain.comm.shm.window import Block, Member, Window

_made: weakref.WeakKeyDictionary[dist.ProcessGroup, Counter[str]] = weakref.WeakKeyDictionary()
"""How many groups of which ranks each world has made."""


def _place(options: Any, ranks: list[int]) -> dist.Store:
    """A place for a new group in the world's store, on which its ranks agree without asking: they count theirs.

    torch's own names of groups differ between ranks after a `new_group(..., use_local_synchronization=True)`.
    """
    world = dist.group.WORLD
    if world is None:  # this group is to be the world
        return dist.PrefixStore("shm", options.store)
    listed = ",".join(map(str, ranks))
    made = _made.setdefault(world, Counter())
    made[listed] += 1
    return dist.PrefixStore(f"shm {listed} {made[listed]}", dist.distributed_c10d._get_default_store())


def create(options: Any, _: Any) -> ShmProcessGroup:
    """For torch: the process group of `options`, made by its ranks alone."""
    me, size, timeout = options.group_rank, options.group_size, options.timeout
    ranks = list(options.global_ranks_in_group) or list(range(size))
    store = _place(options, ranks)
    inner = _gloo("inner", store, me, size, timeout)
    block = Block()
    own = {"host": arena.host_name(), "offset": block.offset, "address": asdict(block.address)}
    store.set(f"memory {me}", json.dumps(own))
    found = [json.loads(text) for text in _values(store, [f"memory {rank}" for rank in range(size)])]
    hosts = by_host([one["host"] for one in found])
    mates = next(mates for mates in hosts if me in mates)
    members = [
        Member(ranks[mate], arena.Address(**found[mate]["address"]), found[mate]["offset"]) for mate in mates
    ]
    window = Window(block, members, mates.index(me))
    _finish(window, timeout, f"backend shm, rank {ranks[me]}: group {options.group_id!r} of ranks {ranks}")
    arena.own().forget_file()
    here = Exchange(window)
    exchange: Exchange | Hosts = here
    if len(hosts) > 1:
        partners = positions(hosts, me)
        across = None
        if partners is not None:
            position, others = partners
            across = _gloo(f"across {position}", store, others.index(me), len(others), timeout)
        exchange = Hosts(here, hosts, me, across, inner)
    return ShmProcessGroup(options.store, me, ranks, options.group_id, timeout, exchange, inner)


def _gloo(name: str, store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    return dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, size, timeout)


def _values(store: Any, keys: list[str]) -> list[bytes]:
    """Several values, waiting for all; in one request where the store can."""
    extended = store.has_extended_api()
    values: list[bytes] = store.multi_get(keys) if extended else [store.get(key) for key in keys]
    return values


def _finish(window: Window, timeout: timedelta, what: str) -> None:
    """Wait until all have mapped everything.

    Raises:
        BackendError: some rank does not come, or is gone.
    """
    steps: Iterator[None] = window.meet()
    until = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            next(steps)
        except StopIteration:
            return
        time.sleep(0.0005)
        reason = window.lost()
        if reason is None and time.monotonic() > until:
            reason = f"not every rank came within {timeout.total_seconds():g} s"
        if reason is not None:
            raise BackendError(f"{what} was not made: {reason}")
