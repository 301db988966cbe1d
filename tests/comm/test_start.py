"""`init_distributed` under launchers: imitated ones, and a real mpiexec where there is one."""

from __future__ import annotations

import inspect
import os
import random
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.comm.test_discovery import ONE_OF_OPEN_MPI, SALLOC_SHELL, SBATCH, TORCHRUN, VARIABLES
from xtrain import comm
from xtrain.base.errors import BackendError, ConfigError
from xtrain.comm import groups, launchers


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variable is set, and what the test's call sets is gone afterwards."""
    for name in {*VARIABLES, *os.environ}:
        if name in VARIABLES or name.startswith(("SLURM_", "PMI", "OMPI_")):
            monkeypatch.setenv(name, "")  # so that it is restored or removed at the end, whoever sets it
            monkeypatch.delenv(name)
    return monkeypatch


def _under(env: dict[str, str], by_rank: dict[str, list[str]]) -> tuple[float, dict[str, str | None]]:
    """Start a process group as a rank of a launcher would."""
    dist.destroy_process_group()
    rank = int(os.environ["RANK"])
    saved = dict(os.environ)
    try:
        for name in VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(env, **{name: values[rank] for name, values in by_rank.items()})
        comm.init_distributed("gloo", verbose=False)
        total = torch.tensor([float(comm.get_rank() + 1)])
        comm.all_reduce(total)
        assert comm.get_local_rank() == rank
        return total.item(), {name: os.environ.get(name) for name in TORCHRUN}
    finally:
        os.environ.clear()
        os.environ.update(saved)


def _free_port(among: range) -> int:
    for port in random.sample(among, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no port of {among} is free")


def test_ranks_of_a_slurm_step_meet(ranks: Any) -> None:
    port = _free_port(launchers.SLURM_PORTS)
    env = {
        "SLURM_JOB_ID": str(port - launchers.SLURM_PORTS.start),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
    }
    nodes = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "localhost,n[1-2]", "SLURM_NTASKS": "64"}
    results = ranks(2, _under, env | nodes, {"SLURM_PROCID": ["0", "1"], "SLURM_LOCALID": ["0", "1"]})
    for rank, (total, after) in enumerate(results):
        assert total == 3.0
        assert after == {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        }  # fmt: skip


@pytest.mark.parametrize(
    "env", [{}, SBATCH, SALLOC_SHELL, ONE_OF_OPEN_MPI], ids=["none", "sbatch", "salloc", "ompi"]
)
def test_a_process_that_is_alone_waits_for_nobody(
    environment: pytest.MonkeyPatch, env: dict[str, str]
) -> None:
    for name, value in env.items():
        environment.setenv(name, value)
    comm.init_distributed("gloo")
    try:
        assert (comm.get_rank(), comm.get_world_size(), comm.get_local_rank()) == (0, 1, 0)
    finally:
        comm.destroy_process_group()


def test_devices_are_taken_by_the_launchers_local_rank(environment: pytest.MonkeyPatch) -> None:
    assert comm.find_local_rank() == 0
    for name, value in {
        "PMI_RANK": "3",
        "PMI_SIZE": "4",
        "MPI_LOCALRANKID": "1",
        "MPI_LOCALNRANKS": "2",
    }.items():
        environment.setenv(name, value)
    environment.setenv("LOCAL_WORLD_SIZE", "")
    environment.delenv("LOCAL_WORLD_SIZE")
    assert comm.find_local_rank() == 1  # before init_distributed
    assert "LOCAL_WORLD_SIZE" not in os.environ  # two hosts
    environment.delenv("LOCAL_RANK")
    environment.setenv("MPI_LOCALNRANKS", "4")
    environment.setenv("MPI_LOCALRANKID", "3")
    assert comm.find_local_rank() == 3
    assert os.environ["LOCAL_WORLD_SIZE"] == "4"
    environment.setenv("LOCAL_RANK", "2")
    assert comm.find_local_rank() == 2


def test_an_init_method_is_used_and_its_own_ranks_count(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(BackendError, match=r"a lone process could not start gloo at file://.*rank"):
        comm.init_distributed("gloo", init_method=f"file://{tmp_path}/store")
    for url, place in (("?rank=0&world_size=1", {}), ("", {"rank": 0, "world_size": 1})):
        comm.init_distributed("gloo", init_method=f"file://{tmp_path}/store{url}", **place)
        assert comm.get_world_size() == 1
        comm.destroy_process_group()


def test_timeouts_are_deepspeeds(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("DEEPSPEED_TIMEOUT", raising=False)
    assert groups.default_timeout() == timedelta(minutes=10)
    environment.setenv("DEEPSPEED_TIMEOUT", "3")
    assert groups.default_timeout() == timedelta(minutes=3)
    environment.setenv("DEEPSPEED_TIMEOUT", "soon")
    with pytest.raises(ConfigError, match="DEEPSPEED_TIMEOUT='soon'"):
        comm.init_distributed()
    with pytest.raises(ConfigError, match=r"timeout=30\) must be a datetime.timedelta"):
        comm.init_distributed(timeout=30)  # type: ignore[arg-type]


@pytest.mark.deepspeed
def test_the_signatures_are_deepspeeds() -> None:
    """The timeout's default apart, which is read from the environment when it is needed."""
    deepspeed = pytest.importorskip("deepspeed.comm.comm", reason="needs the extra deepspeed")
    for name in ("init_distributed", "mpi_discovery"):
        ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (comm, deepspeed))
        assert list(ours) == list(theirs)
        assert all(ours[key].default == theirs[key].default for key in ours if key != "timeout")


# ---------------------------------------------------------------- a real mpiexec

_MPIEXEC = shutil.which(
    "mpiexec", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
)
_HAS_MPI4PY = find_spec("mpi4py") is not None
_SCRIPT = """
import os, sys, torch
from xtrain import comm
if sys.argv[1] == "ask":
    comm.mpi_discovery(distributed_port=int(os.environ["MASTER_PORT"]))
comm.init_distributed("gloo", verbose=False)
total = torch.tensor([float(comm.get_rank() + 1)])
comm.all_reduce(total)
sys.stdout.write(f"{comm.get_rank()} {comm.get_local_rank()} {comm.get_world_size()} {total.item()}\\n")
"""


@pytest.mark.mpi
@pytest.mark.skipif(_MPIEXEC is None, reason="there is no mpiexec")
@pytest.mark.parametrize(
    ("options", "how"),
    [
        ([], "read"),
        pytest.param([], "ask", marks=pytest.mark.skipif(not _HAS_MPI4PY, reason="there is no mpi4py")),
        pytest.param(
            # Two hosts in the eyes of Hydra (MPICH), both this one: only MPI can say where rank 0 is.
            ["-launcher", "fork", "-hosts", f"{socket.gethostname()},localhost"],
            "read",
            marks=pytest.mark.skipif(not _HAS_MPI4PY, reason="there is no mpi4py"),
        ),
    ],
    ids=["one host", "all through MPI", "address through MPI"],
)
def test_ranks_of_a_real_mpiexec_meet(
    environment: pytest.MonkeyPatch, tmp_path: Path, options: list[str], how: str
) -> None:
    assert _MPIEXEC is not None
    version = subprocess.run([_MPIEXEC, "--version"], capture_output=True, text=True).stdout
    if options and "HYDRA" not in version:
        pytest.skip("only MPICH's mpiexec can take one host for two")
    (tmp_path / "script.py").write_text(_SCRIPT)
    environment.setenv("MASTER_PORT", str(_free_port(launchers.SLURM_PORTS)))
    environment.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    command = [_MPIEXEC, *options, "-n", "2", sys.executable, str(tmp_path / "script.py"), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    local = "0" if options else "1"
    assert sorted(done.stdout.splitlines()) == ["0 0 2 3.0", f"1 {local} 2 3.0"]
