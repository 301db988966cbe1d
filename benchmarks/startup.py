"""How long it takes until ranks have a process group, for 2 to 64 light ranks, and what a fit says for 8192.

    python benchmarks/startup.py                       over a TCP store, with gloo
    python benchmarks/startup.py --mpi                 the same under this Python's mpiexec

Ranks are processes that do nothing else. Over TCP they are forked from one that has imported torch; mpiexec starts
interpreters, so there the clock starts after the import, and every time is that of the slowest rank. What is measured:

    meet    finding the others: the store and xtrain's meeting (over MPI: the start of MPI's own world and its store)
    group   making the first process group
    new     `new_group` of all ranks, once more
    reduce  the first all-reduce of one number

Two models are fitted, t = a + b n and t = a + b n + c n^2 (gloo connects every pair), by least squares of the relative
errors, coefficients not negative. Dozens of processes share few cores here and all their work adds up, which on a
cluster is done side by side: what a fit says for 8192 is an upper bound that knows nothing of networks.
"""

from __future__ import annotations

import argparse
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
TARGET = 8192
Times = dict[str, float]


# ---------------------------------------------------------------- one rank


def _timed(times: Times, name: str, action: Callable[[], Any]) -> Any:
    begun = time.perf_counter()
    result = action()
    times[name] = time.perf_counter() - begun
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


def tcp_rank(rank: int, ranks: int, port: int, begin: Any, pipe: Any) -> None:
    """Steps of `init_distributed`, apart."""
    import torch
    import torch.distributed as dist

    from xtrain.comm import meeting

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    timeout, times = timedelta(seconds=300), Times()

    # Rank 0 listens before the clock starts: who comes too early would sleep about a second before it tries again.
    stores = [meeting.open_store("gloo", None, rank, ranks, timeout)[0]] if rank == 0 else []

    def meet() -> meeting.Meeting:
        store = stores[0] if stores else meeting.open_store("gloo", None, rank, ranks, timeout)[0]
        store.set_timeout(timeout)
        together = meeting.Meeting(store, "here", "gloo", rank, ranks)
        together.meet(timeout)
        return together

    begin.wait()
    together = _timed(times, "meet", meet)
    _timed(
        times,
        "group",
        lambda: dist.init_process_group(
            "gloo", store=together.group_store, rank=rank, world_size=ranks, timeout=timeout
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


def over_tcp(ranks: int) -> Times:
    """The slowest rank's times."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "xtrain.comm"])
    begin, port = context.Barrier(ranks), _free_port()
    pipes, processes = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=tcp_rank, args=(rank, ranks, port, begin, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    found = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join()
    return {name: max(times[name] for times in found) for name in PARTS}


def over_mpi(ranks: int) -> Times:
    """The slowest rank's times."""
    mpiexec = Path(sys.executable).parent / "mpiexec"
    with tempfile.TemporaryDirectory() as name:
        command = [str(mpiexec), "-n", str(ranks), sys.executable, __file__, "--rank-of-mpi", name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = [json.loads(path.read_text()) for path in Path(name).glob("*.json")]
    assert len(found) == ranks
    return {part: max(times[part] for times in found) for part in PARTS}


# ---------------------------------------------------------------- the model


def fit(
    sizes: list[int], seconds: list[float], quadratic: bool
) -> tuple[Callable[[float], float], str, float]:
    """Least squares with weights 1/t, coefficients not negative: (model, its text, largest relative residual)."""
    import numpy as np

    n, t = np.array(sizes, dtype=float), np.array(seconds)
    terms = {"1": n**0, "n": n, "n²": n**2} if quadratic else {"1": n**0, "n": n}
    names = list(terms)
    while True:  # a negative coefficient means that the term is not there
        columns = np.stack([terms[name] for name in names], axis=1)
        found, *_ = np.linalg.lstsq(columns / t[:, None], np.ones_like(t), rcond=None)
        if (found >= 0).all() or len(names) == 1:
            break
        names.pop(int(np.argmin(found)))
    powers = [{"1": 0, "n": 1, "n²": 2}[name] for name in names]

    def model(ranks: float) -> float:
        return float(sum(c * ranks**p for c, p in zip(found, powers, strict=True)))

    text = " + ".join(
        f"{1000 * c:.3g} ms{'' if name == '1' else f' {name}'}" for c, name in zip(found, names, strict=True)
    )
    residual = max(abs(model(size) / value - 1) for size, value in zip(sizes, seconds, strict=True))
    return model, text, residual


def extrapolated(
    sizes: list[int], rounds: list[list[float]], quadratic: bool
) -> tuple[str, float, float, float, float]:
    """(model, residual, prediction, and its range when any one size is left out of the fit)."""
    medians = [statistics.median(row) for row in rounds]
    model, text, residual = fit(sizes, medians, quadratic)
    others = []
    for out in range(len(sizes)):
        left = [i for i in range(len(sizes)) if i != out]
        others.append(fit([sizes[i] for i in left], [medians[i] for i in left], quadratic)[0](TARGET))
    return text, residual, model(TARGET), min(others), max(others)


def main() -> None:
    """Measure, print the table and the fits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mpi", action="store_true", help="under mpiexec instead of over a TCP store")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every time there, too")
    parser.add_argument("--rank-of-mpi", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of_mpi is not None:
        mpi_rank(args.rank_of_mpi)
        return
    measure, found = over_mpi if args.mpi else over_tcp, {}
    print(
        "ranks  " + "  ".join(f"{part:>22}" for part in PARTS) + "   median (smallest … largest), ms",
        flush=True,
    )
    for size in args.sizes:
        rows = [measure(size) for _ in range(args.rounds)]
        found[size] = {part: [row[part] for row in rows] for part in PARTS}
        cells = [
            f"{1000 * statistics.median(v):.4g} ({1000 * min(v):.4g} … {1000 * max(v):.4g})"
            for v in found[size].values()
        ]
        print(f"{size:>5}  " + "  ".join(f"{cell:>22}" for cell in cells), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found))
    for part in PARTS if len(args.sizes) > 3 else ():
        rounds = [found[size][part] for size in args.sizes]
        for quadratic in (False, True):
            text, residual, at, least, most = extrapolated(args.sizes, rounds, quadratic)
            print(
                f"{part:<7} t = {text:<45} residual up to {100 * residual:.0f} %; {TARGET} ranks: {at:.3g} s, "
                f"{least:.3g} … {most:.3g} s with one size left out"
            )


if __name__ == "__main__":
    main()
