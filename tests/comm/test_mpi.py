"""The MPI process group under a real mpiexec: one start per world size runs every check of mpi_checks.py.

mpi4py and an MPI library (`pip install -e '.[mpi]'`) are not needed to install or test the rest; without them
these tests are skipped, except for those of the messages that say so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.comm import mpi_checks, mpi_training
from xtrain.base.errors import BackendError
from xtrain.comm.mpi.library import load

ROOT = Path(__file__).parents[2]
SIZES = (2, 4)
SECONDS = 120.0

_beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
MPIEXEC = shutil.which("mpiexec", path=_beside)
MPI_MISSING = [
    name
    for name, there in (
        ("mpi4py", importlib.util.find_spec("mpi4py") is not None),
        ("mpiexec", MPIEXEC is not None),
    )
    if not there
]
needs_mpi = pytest.mark.skipif(
    bool(MPI_MISSING), reason=f"not installed: {' and '.join(MPI_MISSING)} (xtrain[mpi])"
)


def start(
    module: str, *arguments: str, ranks: int = 0, seconds: float = SECONDS, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a module of the tests on `ranks` ranks; 0: in one process without mpiexec."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    if ranks:
        command = [str(MPIEXEC), "-n", str(ranks), *command]
    places = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


class Started:
    """What the ranks of one start reported."""

    def __init__(self, ranks: int, folder: Path) -> None:
        self.outcome = start("tests.comm.mpi_checks", str(folder), ranks=ranks)
        files = [folder / f"{rank}.json" for rank in range(ranks)]
        self.ranks = [json.loads(file.read_text()) if file.exists() else {} for file in files]

    def value(self, check: str) -> Any:
        """The check's value on rank 0, after all ranks have passed it."""
        for rank, results in enumerate(self.ranks):
            if check not in results:
                pytest.fail(f"rank {rank} did not come to {check}: {self.outcome.stderr[-3000:]}")
            if results[check]["error"]:
                pytest.fail(f"rank {rank}: {results[check]['error']}")
        return self.ranks[0][check]["value"]


_started: dict[int, Started] = {}


@pytest.fixture
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Started:
    """The one start with this number of ranks."""
    ranks = request.param
    if ranks not in _started:
        _started[ranks] = Started(ranks, tmp_path_factory.mktemp(f"mpi{ranks}"))
    return _started[ranks]


@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize("check", list(mpi_checks.CHECKS))
@pytest.mark.parametrize("started", SIZES, indirect=True)
def test_check(started: Started, check: str) -> None:
    started.value(check)


@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize("started", SIZES, indirect=True)
def test_job_ends_in_order(started: Started) -> None:
    assert started.outcome.returncode == 0, started.outcome.stderr[-3000:]


@needs_mpi
@pytest.mark.bits
@pytest.mark.mpi
@pytest.mark.parametrize("run", list(mpi_training.ENGINE_RUNS))
@pytest.mark.parametrize("started", SIZES, indirect=True)
def test_engine_gives_the_losses_of_gloo(started: Started, ranks: Any, run: str) -> None:
    found = [float.fromhex(loss) for loss in started.value("engine_in_every_stage")[run]]
    expected = [float.fromhex(loss) for loss in ranks(len(started.ranks), mpi_training.engine, run)[0]]
    if "aligned" in run or len(started.ranks) == 2:
        assert found == expected  # bit for bit: two terms have only one sum
    else:
        assert found == pytest.approx(expected, rel=2e-2 if "bf16" in run else 1e-6)


@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "error",
            ["the data of rank 1 are unreadable", "rank 1 has ended without taking part", "float32[1000]"],
        ),
        ("left", ["rank 1 has ended without taking part"]),
        ("killed", []),  # mpiexec itself ends the job and says with which signal
    ],
)
def test_a_rank_that_is_gone_hangs_nobody(kind: str, words: list[str]) -> None:
    outcome = start("tests.comm.mpi_failures", kind, ranks=2)
    assert outcome.returncode != 0
    for word in words:
        assert word in outcome.stdout + outcome.stderr


@needs_mpi
@pytest.mark.mpi
def test_different_calls_are_named_on_every_rank(tmp_path: Path) -> None:
    """MPI matches calls by their order alone: an object gather met another rank's reduce-scatter, which passed."""
    outcome = start("tests.comm.mpi_failures", "mismatches", str(tmp_path), ranks=2)
    files = [tmp_path / f"{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), outcome.stderr[-3000:]
    told = [json.loads(file.read_text()) for file in files]
    expected = {
        "operation": ("all_gather (int64 of ", "reduce_scatter (float32 of 2 elements, SUM)"),
        "elements": (
            "all_reduce (float32 of 1000 elements, SUM)",
            "all_reduce (float32 of 1001 elements, SUM)",
        ),
        "a large one": ("all_reduce (float32 of 1048576", "all_gather (float32 of 1048576"),
        "dtype": ("all_reduce (float32 of 8", "all_reduce (int32 of 8"),
        "reduction": ("of 8 elements, SUM)", "of 8 elements, MAX)"),
        "root": ("from rank 0)", "from rank 1)"),
        "barrier": ("barrier", "all_to_all (float32)"),
        "in a future": ("all_reduce (float32 of 8", "all_gather (float32 of [1, 1] elements)"),
    }
    for results in told:
        assert set(results) == {*expected, "after"}
        for name, (zero, one) in expected.items():
            seconds, text = results[name]
            calls = text.partition("the ranks of a group make different calls: ")[2].split("; rank 1 ")
            assert calls[0].startswith("rank 0 "), (name, text)
            assert zero in calls[0], (name, text)
            assert one in calls[1], (name, text)
            assert seconds < 10
        assert results["after"][1] == "[2.0, 2.0, 2.0]"


@needs_mpi
@pytest.mark.mpi
def test_a_time_out_names_who_has_not_come() -> None:
    outcome = start("tests.comm.mpi_failures", "late", ranks=4)
    first = next(line for line in outcome.stdout.splitlines() if "backend mpi, rank 0 of 4" in line)
    assert "all_reduce of float32[1000] (4000 bytes)" in first
    assert "did not finish within 4 s: ranks 1, 2 have not come to it; " in first
    assert "rank 1 was last seen waiting for broadcast of float32[7]" in first


@needs_mpi
@pytest.mark.mpi
def test_world_of_another_size_than_asked_for() -> None:
    outcome = start("tests.comm.mpi_failures", "wrong size", ranks=2)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.count("3 ranks were asked for") == 2
    assert "`mpiexec -n 3`" in outcome.stdout


@needs_mpi
@pytest.mark.mpi
def test_several_ranks_without_mpiexec() -> None:
    outcome = start("tests.comm.mpi_failures", "error", RANK="1", WORLD_SIZE="2")
    assert outcome.returncode != 0
    assert "backend mpi, rank 1: 2 ranks were asked for" in outcome.stderr
    assert "mpiexec did not start this process" in outcome.stderr


def test_mpi4py_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv("PMI_RANK", "3")
    with pytest.raises(BackendError, match=r"backend mpi, rank 3: .*mpi4py is not installed: pip install"):
        load()


class _WithoutLibrary(types.ModuleType):
    """mpi4py as it behaves where no MPI library can be loaded."""

    def __getattr__(self, name: str) -> Any:
        if name == "MPI":
            raise RuntimeError("cannot load MPI library\nlibmpi.so: cannot open shared object file")
        raise AttributeError(name)


def test_mpi_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", _WithoutLibrary("mpi4py"))
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    with pytest.raises(BackendError, match=r"finds no MPI library \(cannot load MPI library\)"):
        load()


def test_mpi_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    single = types.SimpleNamespace(Query_thread=lambda: 0, THREAD_SERIALIZED=2)
    package = types.ModuleType("mpi4py")
    package.MPI = single  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    with pytest.raises(BackendError, match="MPI_THREAD_SERIALIZED"):
        load()
