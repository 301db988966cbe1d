"""How long it takes until ranks have a process group, for 2 to 64 light ranks, and what a fit says for 8192.

    python benchmarks/startup.py                       over torch's TCP store, with gloo
    python benchmarks/startup.py --store run           over the run's store, as the first node's ranks have it
    python benchmarks/startup.py --store relay         over a relay of it, as the other nodes' ranks have it
    python benchmarks/startup.py --store relay --only-meeting --sizes 64 128 256 512
    python benchmarks/startup.py --mpi                 the same under this Python's mpiexec

    store   processor time of the process that keeps the run's store (and the relay), over all parts together

Ranks are processes that do nothing else. Over TCP they are forked from one that has imported torch; mpiexec starts
interpreters, so there the clock starts after the import, and every time is that of the slowest rank. What is measured:

    meet    finding the others: the store and xtrain's rendezvous (over MPI: the start of MPI's own world and its store)
    group   making the first process group
    new     `new_group` of all ranks, once more
    reduce  the first all-reduce of one number

Beside the time stands the processor time of the busiest rank. Dozens of ranks share few cores here, so their times are
sums of everybody's work; on a cluster each rank has a core, and what cannot be done side by side is the work of the
busiest one: that of rank 0, which serves the store, and for gloo that of every rank, which connects to all others. Both
grow with n, so the model is t = a + b n, fitted to the busiest rank's processor time by least squares of the relative
errors (a, b not negative). It leaves out the network, and for MPI it is an upper bound, because waiting ranks poll.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

PARTS = ("meet", "group", "new", "reduce")
COLUMNS = tuple(f"{part}{what}" for part in PARTS for what in ("", " cpu"))
TARGET = 8192
Times = dict[str, float]


# ---------------------------------------------------------------- one rank


def _timed(times: Times, name: str, action: Callable[[], Any]) -> Any:
    begun, work = time.perf_counter(), time.process_time()
    result = action()
    times[name], times[f"{name} cpu"] = time.perf_counter() - begun, time.process_time() - work
    return result


def _the_rest(times: Times, timeout: timedelta) -> None:
    """A second group, and a first sum in it."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    group = _timed(times, "new", lambda: dist.new_group(timeout=timeout))
    total = torch.ones(1)
    _timed(times, "reduce", lambda: dist.all_reduce(total, group=group))
    assert total.item() == dist.get_world_size()


def tcp_rank(rank: int, ranks: int, port: int, where: dict[str, str], begin: Any, pipe: Any) -> None:
    """Steps of `init_distributed`, apart."""
    import torch
    import torch.distributed as dist

    from xtrain.comm import rendezvous, tcp_store

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **where)
    tcp_store.keep_gloo_on_this_host()
    timeout, times = timedelta(seconds=300), Times()

    # Rank 0 listens before the clock starts: who comes too early would sleep about a second before it tries again.
    stores = [rendezvous.open_store("gloo", None, rank, ranks, timeout)[0]] if rank == 0 else []

    def meet() -> rendezvous.Rendezvous:
        store = stores[0] if stores else rendezvous.open_store("gloo", None, rank, ranks, timeout)[0]
        store.set_timeout(timeout)
        together = rendezvous.Rendezvous(store, "here", "gloo", rank, ranks)
        together.join(timeout)
        return together

    begin.wait()
    together = _timed(times, "meet", meet)
    _timed(
        times,
        "group",
        lambda: dist.init_process_group(
            "gloo", store=together.group_store(timeout), rank=rank, world_size=ranks, timeout=timeout
        ),
    )
    _the_rest(times, timeout)
    dist.barrier()
    pipe.send(times)
    pipe.recv()  # rank 0 keeps the store until all have reported
    os._exit(0)


def mpi_rank(folder: Path) -> None:
    """One process of mpiexec's."""
    import torch.distributed as dist

    from xtrain.comm import mpi
    from xtrain.comm.mpi.library import load

    timeout, times = timedelta(seconds=600), Times()
    world = load().COMM_WORLD  # importing mpi4py starts MPI, which waits for the slowest import
    from xtrain.comm.mpi import group  # before the clock
    from xtrain.comm.mpi import world as worlds

    assert group is not None
    world.Barrier()
    joined = _timed(times, "meet", lambda: worlds.join(-1, -1, timeout))
    assert joined.size == world.Get_size()
    world.Barrier()
    _timed(times, "group", lambda: mpi.start(timeout=timeout))
    _the_rest(times, timeout)
    (folder / f"{world.Get_rank()}.json").write_text(json.dumps(times))
    dist.barrier()


# ---------------------------------------------------------------- all ranks


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def over_run_store(ranks: int, relayed: bool) -> Times:
    """As `over_tcp`; this process, which only waits meanwhile, keeps the store."""
    from xtrain.comm.store import Relay, Server, environment

    secret = os.urandom(32)
    server = Server("127.0.0.1", secret)
    relay = Relay(*server.address, secret) if relayed else None
    work = time.process_time()
    times = over_tcp(ranks, environment(*(relay or server).address, secret))
    times["store cpu"] = time.process_time() - work
    if relay is not None:
        relay.close()
    server.close()
    return times


def _meet_in_threads(ranks: int, where: dict[str, str], begin: Any, end: Any) -> None:
    """One process whose threads meet as ranks would."""
    from concurrent.futures import ThreadPoolExecutor

    from xtrain.comm import rendezvous, store

    os.environ.update(where)
    timeout = timedelta(seconds=300)

    def meet(rank: int) -> None:
        keys = store.from_environment(timeout)
        rendezvous.Rendezvous(keys, "here", "gloo", rank, ranks).join(timeout)

    with ThreadPoolExecutor(ranks) as threads:
        begin.wait()
        list(threads.map(meet, range(ranks)))
    end.wait()
    os._exit(0)


def only_meeting(ranks: int, relayed: bool) -> Times:
    """Time until threads of one other process have met, and what that costs the process that keeps the store."""
    from xtrain.comm.store import Relay, Server, environment

    secret = os.urandom(32)
    server = Server("127.0.0.1", secret)
    relay = Relay(*server.address, secret) if relayed else None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "xtrain.comm"])
    begin, end = context.Barrier(2), context.Barrier(2)
    where = environment(*(relay or server).address, secret)
    process = context.Process(target=_meet_in_threads, args=(ranks, where, begin, end), daemon=True)
    process.start()
    begin.wait()
    since, work = time.perf_counter(), time.process_time()
    end.wait()
    times = {"meet": time.perf_counter() - since, "store cpu": time.process_time() - work}
    process.join()
    if relay is not None:
        relay.close()
    server.close()
    return times


def over_tcp(ranks: int, where: dict[str, str] | None = None) -> Times:
    """The slowest rank's times, and the busiest rank's processor times.

    Args:
        where: variables that name the run's store; None: torch's.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "xtrain.comm"])
    begin, port = context.Barrier(ranks), _free_port()
    pipes, processes = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=tcp_rank, args=(rank, ranks, port, where or {}, begin, theirs), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    found = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join()
    return {name: max(times[name] for times in found) for name in COLUMNS}


def over_mpi(ranks: int) -> Times:
    """The slowest rank's times, and the busiest rank's processor times."""
    mpiexec = Path(sys.executable).parent / "mpiexec"
    with tempfile.TemporaryDirectory() as name:
        command = [str(mpiexec), "-n", str(ranks), sys.executable, __file__, "--rank-of-mpi", name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = [json.loads(path.read_text()) for path in Path(name).glob("*.json")]
    assert len(found) == ranks
    return {name: max(times[name] for times in found) for name in COLUMNS}


# ---------------------------------------------------------------- the model


def fit(sizes: list[int], seconds: list[float]) -> tuple[float, float]:
    """a and b of t = a + b n, by least squares with weights 1/t; a negative one is left out."""
    import numpy as np

    n, t = np.array(sizes, dtype=float), np.array(seconds)
    columns = np.stack([n**0, n], axis=1) / t[:, None]
    (a, b), *_ = np.linalg.lstsq(columns, np.ones_like(t), rcond=None)
    if a < 0:
        return 0.0, float((1 / columns[:, 1]).mean())
    return (float(a), float(b)) if b > 0 else (float(1 / columns[:, 0].mean()), 0.0)


def extrapolated(sizes: list[int], medians: list[float]) -> str:
    """The fit, its largest residual, and what it says for TARGET ranks, with each size left out once, too."""
    a, b = fit(sizes, medians)
    residual = max(abs((a + b * n) / t - 1) for n, t in zip(sizes, medians, strict=True))
    others = []
    for out in range(len(sizes)):
        left = [i for i in range(len(sizes)) if i != out]
        a_, b_ = fit([sizes[i] for i in left], [medians[i] for i in left])
        others.append(a_ + b_ * TARGET)
    return (
        f"t = {1000 * a:.3g} ms + {1000 * b:.3g} ms n, residual up to {100 * residual:.0f} %; {TARGET} ranks: "
        f"{a + b * TARGET:.3g} s, {min(others):.3g} … {max(others):.3g} s with one size left out"
    )


def main() -> None:
    """Measure, print the table and the fits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mpi", action="store_true", help="under mpiexec instead of over a TCP store")
    parser.add_argument("--store", choices=["tcp", "run", "relay"], default="tcp")
    parser.add_argument(
        "--only-meeting",
        action="store_true",
        help="ranks are threads that meet at the run's store, and no more",
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every time there, too")
    parser.add_argument("--rank-of-mpi", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of_mpi is not None:
        mpi_rank(args.rank_of_mpi)
        return
    measure: Callable[[int], Times] = over_mpi if args.mpi else over_tcp
    columns: tuple[str, ...] = COLUMNS
    found: dict[int, dict[str, list[float]]] = {}
    if args.store != "tcp" and not args.mpi:
        measure = functools.partial(over_run_store, relayed=args.store == "relay")
        columns += ("store cpu",)
        if args.only_meeting:
            measure, columns = (
                functools.partial(only_meeting, relayed=args.store == "relay"),
                ("meet", "store cpu"),
            )
    print("medians, ms; cpu: the busiest rank's processor time")
    print("ranks  " + "  ".join(f"{name:>10}" for name in columns), flush=True)
    for size in args.sizes:
        rows = [measure(size) for _ in range(args.rounds)]
        found[size] = {name: [row[name] for row in rows] for name in columns}
        cells = [f"{1000 * statistics.median(values):.4g}" for values in found[size].values()]
        print(f"{size:>5}  " + "  ".join(f"{cell:>10}" for cell in cells), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found))
    parts = [name.removesuffix(" cpu") for name in columns if name.endswith(" cpu")]
    for part in parts if len(args.sizes) > 3 else ():
        medians = [statistics.median(found[size][f"{part} cpu"]) for size in args.sizes]
        print(f"{part:<7} {extrapolated(args.sizes, medians)}")


if __name__ == "__main__":
    main()
