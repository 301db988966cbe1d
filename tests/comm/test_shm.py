"""Shared memory: every call against its definition, training against gloo, ranks that go wrong, and the memory itself.

The checks are those of the MPI process group, in the ranks of the pool. One start for each of `PLACES` runs them all.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.comm import mpi_collectives, mpi_groups, mpi_training, shm_failures
from tests.comm.mpi_tools import Kind, values
from xtrain import comm
from xtrain.comm.deterministic import tree_sum
from xtrain.comm.shm import arena, zeros
from xtrain.comm.shm.window import SLOT

PLACES = {
    "2 ranks": (2, ""),
    "4 ranks": (4, ""),
    "2 hosts with 2 ranks": (4, "a b a b"),
    "hosts with 3 ranks and 1": (4, "a a b a"),
}
_ABOUT_MPI = {
    "contiguous_memory_is_not_copied",
    "mistakes_are_sentences",
    "a_wait_that_takes_too_long",
    "store_between_ranks",
}
CHECKS = {
    name: check
    for name, check in {**mpi_collectives.CHECKS, **mpi_training.CHECKS, **mpi_groups.CHECKS}.items()
    if name not in _ABOUT_MPI
}


def on_shm(file: str, hosts: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in a world over shared memory in place of the pool's; `hosts`: the name of each rank's."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    if hosts:
        os.environ["XTRAIN_SHM_HOST"] = hosts.split()[rank]
    try:
        comm.init_distributed(
            "shm",
            verbose=False,
            init_method=f"file://{file}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=30),
        )
        return function(*args)
    finally:
        os.environ.pop("XTRAIN_SHM_HOST", None)


def run_checks() -> dict[str, tuple[str, Any]]:
    """Check -> (error, value)."""
    results: dict[str, tuple[str, Any]] = {}
    for name, function in CHECKS.items():
        try:
            results[name] = "", function(dist.get_rank(), dist.get_world_size())
        except Exception:
            results[name] = traceback.format_exc(), None
    return results


_done: dict[str, list[dict[str, tuple[str, Any]]]] = {}


@pytest.fixture
def checked(request: pytest.FixtureRequest, ranks: Any, tmp_path: Path) -> Callable[[str], Any]:
    """A check's value on rank 0, after all ranks have passed it."""
    place = request.param
    if place not in _done:
        number, hosts = PLACES[place]
        _done[place] = ranks(number, on_shm, str(tmp_path / "store"), hosts, run_checks)

    def value(check: str) -> Any:
        for rank, results in enumerate(_done[place]):
            if results[check][0]:
                pytest.fail(f"rank {rank}: {results[check][0]}")
        return _done[place][0][check][1]

    return value


@pytest.mark.parametrize("check", list(CHECKS))
@pytest.mark.parametrize("checked", list(PLACES), indirect=True)
def test_check(checked: Callable[[str], Any], check: str) -> None:
    checked(check)


@pytest.mark.bits
@pytest.mark.parametrize(("checked", "number"), [(p, PLACES[p][0]) for p in PLACES], indirect=["checked"])
def test_engine_gives_the_losses_of_gloo(checked: Callable[[str], Any], ranks: Any, number: int) -> None:
    curves = checked("engine_in_every_stage")
    expected = ranks(number, _gloo_curves)[0]
    for run, curve in curves.items():
        if "aligned" in run or number == 2:
            assert curve == expected[run], run  # bit for bit: two terms have only one sum
        else:
            found, right = [[float.fromhex(loss) for loss in one] for one in (curve, expected[run])]
            assert found == pytest.approx(right, rel=2e-2 if "bf16" in run else 1e-6), run


def _gloo_curves() -> dict[str, list[str]]:
    return {run: mpi_training.engine(run) for run in mpi_training.ENGINE_RUNS}


@pytest.mark.bits
@pytest.mark.parametrize("checked", [place for place in PLACES if PLACES[place][0] == 4], indirect=True)
def test_stages_give_the_same_bits(checked: Callable[[str], Any]) -> None:
    """Without aligned mode, too: a slice's sum is formed in one order, whatever the call. (With one micro-batch a
    step: of several, stages 2 and 3 sum each over the ranks.)"""
    curves = checked("engine_in_every_stage")
    for stage in (1, 2, 3):
        assert curves[f"stage {stage}"] == curves["stage 0"]


# ---------------------------------------------------------------- any size, dtype, operation and place

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CASES = st.lists(
    st.tuples(
        st.sampled_from(["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "reduce"]),
        st.sampled_from([*FLOATS, torch.int32]),
        st.one_of(st.integers(0, 3000), st.sampled_from([SLOT // 4 + 17, SLOT // 2 - 1, SLOT + 1])),
        st.sampled_from([Kind.SUM, Kind.AVG, Kind.MAX]).map(lambda kind: int(kind)),
        st.integers(0, 15),
    ),
    min_size=10,
    max_size=10,
)


def _definition(rows: list[torch.Tensor], kind: Any) -> torch.Tensor:
    """A reduction by the tree of comm/deterministic.py, in float32 for 16-bit floats, rounded once."""
    dtype = rows[0].dtype
    wide = [row.float() if dtype in (torch.bfloat16, torch.float16) else row.clone() for row in rows]
    if kind == Kind.MAX:
        return torch.stack(wide).amax(0).to(dtype) if len(wide[0]) else wide[0].to(dtype)
    total = tree_sum(wide)
    if kind == Kind.AVG:
        total = total.div(len(rows), rounding_mode=None if dtype in FLOATS else "trunc")
    return total.to(dtype)


def _in_window(tensor: torch.Tensor) -> torch.Tensor:
    return zeros(tensor.numel(), tensor.dtype).copy_(tensor)


def run_cases(cases: list[tuple[str, torch.dtype, int, int, int]]) -> None:
    """Each against its definition, to the last bit; `where` says which ranks' buffers lie in the window."""
    me, n = dist.get_rank(), dist.get_world_size()
    for number, (call, dtype, size, kind, where) in enumerate(cases):
        op: Any = Kind.RedOpType(kind)
        whole = size * n if call in ("reduce_scatter", "all_to_all") else size
        rows = [values(r, dtype, (whole,), seed=number) for r in range(n)]
        place = _in_window if where >> me & 1 else torch.clone
        mine, root = place(rows[me]), number % n
        if call == "all_reduce":
            dist.all_reduce(mine, op)
            found, right = mine, _definition(rows, op)
        elif call == "reduce":
            dist.reduce(mine, root, op)
            found, right = mine, _definition(rows, op) if me == root else rows[me]
        elif call == "reduce_scatter":
            found = mine.view(n, -1)[me] if number % 2 else torch.empty(size, dtype=dtype)
            comm.reduce_scatter_tensor(found, mine, op)
            found = found.clone()  # it may be a piece of the input
            right = _definition(rows, op).view(n, -1)[me]
        elif call == "all_gather":
            found = place(torch.zeros(n * size, dtype=dtype))
            comm.all_gather_into_tensor(found, mine)
            right = torch.cat(rows)
        elif call == "all_to_all":
            found = torch.empty_like(mine)
            dist.all_to_all_single(found, mine)
            right = torch.cat([row.view(n, -1)[me] for row in rows])
        else:
            dist.broadcast(mine, root)
            found, right = mine, rows[root]
        mine.add_(1) if found is not mine else None  # nobody may read it any more
        try:
            torch.testing.assert_close(found, right, rtol=0, atol=0)
        except AssertionError as error:
            raise AssertionError(f"{call} {dtype} {size} {op} {where}: {error}") from None


@pytest.mark.parametrize("number", [2, 4])
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases=CASES)
def test_any_case(ranks: Any, tmp_path_factory: Any, number: int, cases: list[Any]) -> None:
    file = tmp_path_factory.mktemp("store") / "store"
    ranks(number, on_shm, str(file), "", run_cases, cases)


# ---------------------------------------------------------------- ranks that go wrong


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("killed", ["rank 1 has died", "all_reduce of float32[1000] (4000 bytes)"]),
        ("inside", ["rank 1 has died", "all_reduce of float32[33554432]"]),
        ("error", ["rank 1 has ended without taking part"]),
        ("future", ["rank 0 waited"]),
        ("stuck", ["did not finish within 1.5 s: rank 1 has not come to it"]),
        ("other", ["make different calls: rank", "all_gather", "all_reduce (float32 of 1000 elements"]),
    ],
)
def test_a_rank_that_goes_wrong_hangs_nobody(kind: str, words: list[str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # the pool's, which has torch loaded
    files = [tmp_path / f"{rank}.txt" for rank in range(3)]
    started = [
        context.Process(
            target=shm_failures.run, args=(kind, rank, 3, str(tmp_path / "store"), str(files[rank]))
        )
        for rank in range(3)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        assert not process.is_alive()
    texts = [file.read_text() for file in files]
    for rank in (0, 2):
        text = texts[rank]
        if kind != "future":
            assert f"backend shm, rank {rank}" in text, text
        if kind in ("killed", "inside", "error", "stuck"):
            assert "PeerLostError" in text, text  # the launcher looks for another rank's failure
        assert float(text.partition("waited ")[2].split()[0]) < 5, text
    for word in words:
        assert word in "".join(texts), texts


# ---------------------------------------------------------------- the memory


def test_memory_is_given_back_and_comes_back_as_zeros() -> None:
    own = arena.Arena()
    tensors = [own.zeros(3000, torch.float32) for _ in range(3)]
    places = [own.offset_of(tensor) for tensor in tensors]
    assert sorted(places) == places
    assert all(place % arena.PAGE == 0 for place in places)
    assert own.offset_of(torch.zeros(1)) == -1
    view = tensors[1].fill_(7.0)[10:20].view(2, 5)
    tensors[1] = torch.zeros(0)
    gc.collect()
    assert own.zeros(3000, torch.float32).data_ptr() != view.data_ptr() - 40  # a view keeps all of it
    assert view.eq(7).all()
    del view
    gc.collect()
    again = own.zeros(3000, torch.float32)
    assert own.offset_of(again) == places[1]
    assert again.eq(0).all()


def test_a_child_does_not_give_back_its_parents_memory() -> None:
    own = arena.own()
    tensor = own.zeros(1000, torch.float32).fill_(3.0)
    child = os.fork()
    if child == 0:
        del tensor
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert tensor.eq(3).all()


def test_life_of_a_process() -> None:
    assert arena.started(os.getpid()) is not None
    child = os.fork()
    if child == 0:
        os._exit(0)
    until = time.monotonic() + 5
    while arena.started(child) is not None and time.monotonic() < until:
        time.sleep(0.01)
    assert arena.started(child) is None  # dead, and not yet waited for
    os.waitpid(child, 0)
    assert arena.started(child) is None


def _files(folder: str) -> tuple[list[str], float]:
    total = torch.ones(100_000)
    dist.all_reduce(total)
    return sorted(os.listdir(folder)), total[0].item()


def _in_files(folder: str, file: str) -> tuple[list[str], float]:
    os.environ["XTRAIN_SHM_DIR"], arena._own = folder, None  # an arena of this kind from now on
    try:
        result: tuple[list[str], float] = on_shm(file, "", _files, folder)
        return result
    finally:
        del os.environ["XTRAIN_SHM_DIR"]
        arena._own = None


def test_files_where_there_is_no_memfd_are_gone_at_once(ranks: Any, tmp_path: Path) -> None:
    folder = tmp_path / "shm"
    folder.mkdir()
    assert ranks(2, _in_files, str(folder), str(tmp_path / "store")) == [([], 2.0), ([], 2.0)]


def test_bytes_are_counted_as_on_any_library(ranks: Any, tmp_path: Path) -> None:
    gloo = ranks(2, _counted)
    assert ranks(2, on_shm, str(tmp_path / "store"), "", _counted) == gloo


def _counted() -> list[tuple[str, int, int]]:
    comm.ledger.reset()
    mpi_training.engine("stage 3")
    return sorted(
        (operation, entry.calls, entry.message_bytes) for (operation, _), entry in comm.ledger.entries.items()
    )
