"""Worker ranks for distributed tests: started once per world size and reused for the whole pytest run.

Starting an interpreter and importing torch takes seconds; a forkserver that has torch loaded forks
ranks in milliseconds. Every task gets a fresh process group over a file store, torn down afterwards.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOAD: list[str] = []
"""Modules that workers find loaded, besides torch and xtrain; for who starts the first pool of the run."""

PATIENCE = 60.0
"""Seconds that the other ranks get after one has failed (they may wait for it in a collective)."""


class RemoteTraceback(Exception):
    """Shows a worker's traceback under the error that is raised in the test."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


def _stacks(pid: int) -> Path:
    """Where a worker writes its stacks when it gets SIGUSR1."""
    return Path(tempfile.gettempdir()) / f"xtrain-test-rank-{pid}.stacks"


def _serve(rank: int, world_size: int, connection: Connection) -> None:
    import torch

    faulthandler.register(signal.SIGUSR1, file=_stacks(os.getpid()).open("w"))
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    while True:
        task = connection.recv()
        if task is None:
            return
        connection.send(_run(rank, world_size, *task))


def _portable(error: BaseException) -> BaseException:
    """The error itself if it can be sent to the test's process, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _run(
    rank: int, world_size: int, store_file: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    import torch
    import torch.distributed as dist

    from xtrain.base.log import logger
    from xtrain.comm import ledger

    level = logger.level
    store = dist.FileStore(store_file, world_size)
    try:
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=PATIENCE)
        )
        dist.barrier()  # else a rank that is done already could leave while another still connects to it
        ledger.reset()
        torch.manual_seed(0)
        value = function(*args)
        _wait_for_all(store, world_size)
        return value, None, ""
    except BaseException as error:  # whatever it was, the test must see it
        store.add("ended", 1)
        return None, _portable(error), traceback.format_exc()
    finally:
        logger.setLevel(level)  # what an engine's config has said stays
        if dist.is_initialized():
            dist.destroy_process_group()


def _wait_for_all(store: Any, world_size: int) -> None:
    """Until no rank needs this one's groups any more: who leaves earlier closes them while others still connect.

    A rank that failed does not wait, and closes its groups: that is what frees the others from a collective.
    """
    store.add("ended", 1)
    deadline = time.monotonic() + PATIENCE
    while store.add("ended", 0) < world_size and time.monotonic() < deadline:
        time.sleep(0.002)


class WorkerPool:
    """`world_size` processes that run one function at a time, together."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[Any] = []
        self._connections: list[Connection] = []
        # For as long as the workers live: a FileStore that is dropped after its folder is gone may wait for it for five
        # minutes, in its destructor.
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._runs = 0

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "xtrain.api", "tests.pool", *PRELOAD])
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, self.world_size, theirs), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._connections.append(ours)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
        """Run `function(*args)` on every rank; return the results by rank, or raise the first failure."""
        if not self._workers:
            self._start()
        assert self._folder is not None
        self._runs += 1
        store = Path(self._folder.name) / f"store-{self._runs}"
        for connection in self._connections:
            connection.send((str(store), function, args))
        results = self._collect(timeout)
        failures = [(error, text) for _, error, text in results if error is not None]
        if failures:
            error, text = failures[0]
            raise error from RemoteTraceback(text)
        return [value for value, _, _ in results]

    def _collect(self, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.world_size:
            missing = {c: rank for rank, c in enumerate(self._connections) if rank not in results}
            ready = wait(list(missing), max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(missing.values())
                where = "\n".join(f"rank {rank}:\n{self._where(rank)}" for rank in late)
                self.close()
                raise TimeoutError(f"ranks {late} did not answer; their pool was ended") from next(
                    (RemoteTraceback(f"{text}\n{where}") for _, error, text in results.values() if error),
                    RemoteTraceback(where),
                )
            for connection in ready:
                rank = missing[connection]
                try:
                    results[rank] = connection.recv()
                except EOFError:
                    self.close()
                    raise RuntimeError(f"worker rank {rank} died") from None
                if results[rank][1] is not None:
                    deadline = min(deadline, time.monotonic() + 2 * PATIENCE)
        return [results[rank] for rank in range(self.world_size)]

    def _where(self, rank: int) -> str:
        """The stacks of a worker that does not answer."""
        pid = self._workers[rank].pid
        os.kill(pid, signal.SIGUSR1)
        time.sleep(1.0)
        return _stacks(pid).read_text()

    def close(self) -> None:
        """End the processes; the next `run` starts new ones."""
        for worker in self._workers:
            worker.kill()
            worker.join()
            _stacks(worker.pid).unlink(missing_ok=True)
        self._workers, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


_POOLS: dict[int, WorkerPool] = {}


def pool(world_size: int) -> WorkerPool:
    """The pool of this size for the whole run."""
    return _POOLS.setdefault(world_size, WorkerPool(world_size))


def close_all() -> None:
    """End all pools."""
    for workers in _POOLS.values():
        workers.close()
