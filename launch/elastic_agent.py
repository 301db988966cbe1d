"""torchrun's agent, as the agents of a run use it: ranks are numbered by the launcher, and meet at the run's own store.

torchrun's c10d rendezvous is not used: it unpickles what it finds in a store that everybody can reach.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousStoreInfo

from xtrain.comm import store as run_store
from xtrain.launch.processes import free_port
from xtrain.launch.rendezvous import Assigned

_GRACE = 2.0
"""Seconds in which the other ranks of a node may notice by themselves that one has failed, and say so."""


def open_store(order: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The run's store, on this node's address; and where it and the script's MASTER_PORT are."""
    server = run_store.Server(order["address"], bytes.fromhex(order["secret"]))
    host, port = server.address
    return server, {
        "store": [host, port],
        "master_port": order["master_port"] or free_port(order["address"]),
    }


class _NodeAgent(LocalElasticAgent):
    """torchrun's agent, but for how it ends ranks.

    torchrun sends SIGTERM and waits 30 s. On SIGTERM our ranks save a checkpoint, which they cannot when one of them is
    gone: so they get a moment to notice that, and are then killed. Only what failed by itself is told as failed.
    """

    def __init__(self, spec: WorkerSpec, started: Callable[[dict[int, int]], None]) -> None:
        super().__init__(spec, DefaultLogsSpecs(), exit_barrier_timeout=0)
        self._told = started
        self.codes: dict[int, int] = {}

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        pids = super()._start_workers(worker_group)
        context: Any = self._pcontext
        handlers, ranks = (
            context.subprocess_handlers,
            {w.local_rank: w.global_rank for w in worker_group.workers},
        )
        close = context.close

        def codes() -> dict[int, int]:
            found = {ranks[local]: handler.proc.poll() for local, handler in handlers.items()}
            return {rank: code for rank, code in found.items() if code is not None}

        def end(death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
            until = time.monotonic() + _GRACE
            while len(codes()) < len(handlers) and time.monotonic() < until:
                time.sleep(0.05)
            self.codes = self.codes or {rank: code for rank, code in codes().items() if code}
            close(signal.SIGKILL, timeout)

        context.close = end
        self._told({ranks[local]: pid for local, pid in pids.items()})
        return pids

    def _exit_barrier(self) -> None:
        """The launcher knows when all nodes are done."""


def run_ranks(order: dict[str, Any], started: Callable[[dict[int, int]], None]) -> dict[int, int]:
    """Start the node's ranks and wait for their end; exit codes of those that failed by themselves.

    Args:
        order: of the launcher.
        started: told the process of each rank.
    """
    os.environ.update(order["env"])
    host, port = order["store"]
    secret = bytes.fromhex(order["secret"])
    relay = None
    if order["node_rank"] > 0:
        relay = run_store.Relay(host, port, secret)
        host, port = relay.address
    os.environ.update(run_store.environment(host, port, secret))
    if order["folder"] is not None:
        os.chdir(order["folder"])
    spec = WorkerSpec(
        role="default",
        local_world_size=order["ranks"],
        entrypoint=sys.executable,
        args=("-u", *order["command"]),
        rdzv_handler=Assigned(
            run_store.RunStore(host, port, secret, timedelta(minutes=5)),
            order["node_rank"],
            order["nodes"],
            RendezvousStoreInfo(*order["master"]),
            os.path.basename(order["run_dir"]),
        ),
        max_restarts=0,
        monitor_interval=0.1,
    )
    agent = _NodeAgent(spec, started)
    try:
        result = agent.run()
    finally:
        if relay is not None:
            relay.close()
    if result.is_failed():
        first = {rank: failure.exitcode for rank, failure in result.failures.items()}
        return agent.codes or first
    return {}
