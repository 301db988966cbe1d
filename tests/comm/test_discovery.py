"""Who a process is, by the environment of each launcher; those of sbatch and salloc are cut from posted ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtrain.base.errors import ConfigError
from xtrain.comm import discovery, launchers
from xtrain.comm.discovery import MpiWorld, Place, discover

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "4321"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
ONE_OF_OPEN_MPI = {name: str(int("SIZE" in name)) for name in OPEN_MPI}
MVAPICH2 = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_FD": "9"}
# sbatch and salloc without srun: the allocation's size, and no step.
SBATCH = {
    "SLURM_JOB_ID": "200505",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODELIST": "gnode[10,20]",
    "SLURM_JOB_NODELIST": "gnode[10,20]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
# The shell that salloc opens where LaunchParameters=use_interactive_step.
SALLOC_SHELL = SBATCH | {
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NODELIST": "gnode10",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "PMIX_RANK": "0",
}
SRUN = SBATCH | {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gnode[10,20]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
}


def _never(why: str, instead: str) -> MpiWorld:
    raise AssertionError(f"MPI was asked: {why}")


def _answer(*world: Any) -> discovery.Ask:
    return lambda why, instead: MpiWorld(*world)


def _found(env: dict[str, str], ask: discovery.Ask = _never, **options: Any) -> tuple[Any, ...] | None:
    place = discover(env, ask=ask, **options)
    return place and (place.rank, place.world_size, place.local_rank, place.master_addr, place.master_port)


def _without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


# ---------------------------------------------------------------- torchrun's variables


@pytest.mark.parametrize("outer", [{}, OPEN_MPI, MPICH, SBATCH, SALLOC_SHELL, {"PMI_RANK": "1"}], ids=str)
def test_a_complete_environment_counts_first(outer: dict[str, str]) -> None:
    assert _found(outer | TORCHRUN) == (3, 8, 1, "head", 4321)


def test_ranks_of_a_launcher_inside_another_are_not_the_outer_ones() -> None:
    """srun -n 2 torchrun --nproc-per-node 4, and a wrapper that starts four processes per MPI rank."""
    elastic = TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}
    outer = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    assert _found(outer | elastic) == _found(SRUN | elastic) == (3, 8, 1, "head", 4321)
    assert _found(OPEN_MPI | TORCHRUN) == (3, 8, 1, "head", 4321)
    of_a_sweep = TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert _found(SRUN | of_a_sweep) == (0, 1, 0, "head", 4321)


def test_a_lone_process_is_nobodys() -> None:
    assert _found({}) is None
    assert _found({"MASTER_ADDR": "head", "MASTER_PORT": "1234", "LOCAL_RANK": "0"}) is None


def test_what_a_world_of_one_lacks_is_filled_in() -> None:
    assert _found({"RANK": "0", "WORLD_SIZE": "1"}) == (0, 1, 0, "127.0.0.1", 29500)


def test_on_one_host_the_local_rank_is_the_rank() -> None:
    env = _without(TORCHRUN, "LOCAL_RANK")
    assert _found(env | {"MASTER_ADDR": "localhost"}) == (3, 8, 3, "localhost", 4321)
    assert _found(_without(env, "MASTER_ADDR") | {"LOCAL_WORLD_SIZE": "8"}) == (3, 8, 3, "127.0.0.1", 4321)


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"RANK": "1"}, "RANK=1 is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set but RANK is not"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 is set but RANK and WORLD_SIZE are not"),
        (_without(TORCHRUN, "LOCAL_RANK"), "RANK=3, WORLD_SIZE=8 is set but LOCAL_RANK is not"),
        (_without(TORCHRUN, "MASTER_ADDR"), "RANK=3, WORLD_SIZE=8 is set but MASTER_ADDR is not"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8, WORLD_SIZE=8: rank 8 cannot be one of 8"),
        (TORCHRUN | {"LOCAL_RANK": "8"}, "LOCAL_RANK=8 with RANK=3, WORLD_SIZE=8"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a whole number"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT='0' is not a whole number of at least 1"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not a port"),
        (TORCHRUN | {"RANK": "-1"}, "RANK='-1' is not a whole number"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a whole number of at least 1"),
        (TORCHRUN | {"LOCAL_RANK": ""}, "LOCAL_RANK='' is not a whole number"),
        (OPEN_MPI | TORCHRUN | {"RANK": "1", "WORLD_SIZE": "4"}, "RANK=1, WORLD_SIZE=4 contradicts Open MPI.*_RANK=3"),
        (OPEN_MPI | {"WORLD_SIZE": "2"}, "WORLD_SIZE=2 contradicts Open MPI.*OMPI_COMM_WORLD_SIZE=4"),
        (MPICH | {"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0, WORLD_SIZE=1 contradicts MPICH.*PMI_RANK=3, PMI_SIZE=4"),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "8"}, "RANK=0, WORLD_SIZE=8 contradicts Slurm.*SLURM_PROCID=5"),
        (OPEN_MPI | MPICH | {"PMI_RANK": "0"}, "two MPI launchers contradict.*OMPI_COMM_WORLD_RANK=3.*PMI_RANK=0"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK=4, OMPI_COMM_WORLD_SIZE=4: rank 4 cannot"),
        (_without(MPICH, "PMI_SIZE"), "PMI_RANK=3 is set but PMI_SIZE is not"),
        (_without(MVAPICH2, "MV2_COMM_WORLD_RANK"), "MV2_COMM_WORLD_SIZE=4 is set but MV2_COMM_WORLD_RANK is not"),
        (MPICH | {"MPI_LOCALRANKID": "2"}, "MPI_LOCALRANKID=2, MPI_LOCALNRANKS=2"),
        (SRUN | {"SLURM_PROCID": "8"}, "SLURM_PROCID=8, SLURM_STEP_NUM_TASKS=8: rank 8 cannot"),
        (SRUN | {"SLURM_LOCALID": "6"}, "SLURM_LOCALID=6 with SLURM_PROCID=5"),
        (_without(SRUN, "SLURM_PROCID"), "SLURM_STEP_ID=0 is set but SLURM_PROCID is not"),
        (SRUN | {"SLURM_STEP_NODELIST": "gnode[10"}, "SLURM_STEP_NODELIST: the host list 'gnode.10' cannot be read"),
        (SRUN | {"SLURM_HET_SIZE": "2"}, "SLURM_HET_SIZE=2 leaves open.*set MASTER_ADDR"),
        (SRUN | {"SLURM_DISTRIBUTION": "arbitrary"}, "SLURM_DISTRIBUTION=arbitrary leaves open"),
    ],
)  # fmt: skip
def test_contradictions_and_gaps_are_named(env: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        discover(env, ask=_never)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- MPI


@pytest.mark.parametrize(
    "env", [OPEN_MPI, MVAPICH2, MPICH, OPEN_MPI | MPICH], ids=["ompi", "mv2", "mpich", "both"]
)
def test_ranks_of_mpi(env: dict[str, str]) -> None:
    """The address comes from MASTER_ADDR, from being on one host, or from MPI itself."""
    assert _found(env | {"MASTER_ADDR": "head"}) == (3, 4, 1, "head", 29500)
    assert _found(env | {"MASTER_ADDR": "head", "MASTER_PORT": "7"}, port=8) == (3, 4, 1, "head", 7)
    assert _found(env, _answer(3, 4, 1, "10.0.0.1"), port=8) == (3, 4, 1, "10.0.0.1", 8)
    one_host = {name: "4" for name in env if "LOCAL_SIZE" in name or "LOCALNRANKS" in name}
    assert _found(env | one_host) == (3, 4, 1, "127.0.0.1", 29500)
    assert _found(env | {"WORLD_SIZE": "4", "MASTER_ADDR": "head"}) == (3, 4, 1, "head", 29500)


def test_a_local_rank_that_pmi_does_not_say_is_asked_for() -> None:
    env = {"PMI_RANK": "3", "PMI_SIZE": "4", "MASTER_ADDR": "head"}
    assert _found(env, _answer(3, 4, 1, "10.0.0.1")) == (3, 4, 1, "head", 29500)


def test_pmix_alone_asks_mpi() -> None:
    assert _found({"PMIX_RANK": "3"}, _answer(3, 4, 1, "10.0.0.1")) == (3, 4, 1, "10.0.0.1", 29500)
    with pytest.raises(ConfigError, match="mpi4py finds rank 0 of 1 where PMIX_RANK=3"):
        discover({"PMIX_RANK": "3"}, ask=_answer(0, 1, 0, "10.0.0.1"))


def test_an_mpi4py_of_another_mpi_is_noticed() -> None:
    with pytest.raises(
        ConfigError, match=r"mpi4py finds rank 0 of 1 where PMI_RANK=3, PMI_SIZE=4.*another MPI"
    ):
        discover(MPICH, ask=_answer(0, 1, 0, "10.0.0.1"))


@pytest.mark.parametrize("absent", [True, False])
def test_without_mpi4py_or_its_library_the_sentence_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, absent: bool
) -> None:
    if absent:
        monkeypatch.setitem(sys.modules, "mpi4py", None)
    else:  # what mpi4py's wheels do where no MPI library is found
        (tmp_path / "mpi4py").mkdir()
        (tmp_path / "mpi4py" / "__init__.py").touch()
        (tmp_path / "mpi4py" / "MPI.py").write_text(
            "raise RuntimeError('cannot load MPI library\\nlibmpi.so')"
        )
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("mpi4py", "mpi4py.MPI"):
            monkeypatch.delitem(sys.modules, name, raising=False)
    sentence = (
        r"PMI_RANK=3, PMI_SIZE=4.* does not say MASTER_ADDR, and mpi4py cannot be asked \(.*set MASTER_ADDR"
    )
    with pytest.raises(ConfigError, match=sentence) as caught:
        discover(MPICH)
    assert "\n" not in str(caught.value)
    for name in ("mpi4py", "mpi4py.MPI"):
        sys.modules.pop(name, None)


def test_azureml_as_in_deepspeed() -> None:
    env = OPEN_MPI | {"AZUREML_EXPERIMENT_ID": "x", "AZ_BATCH_MASTER_NODE": "10.0.0.4:6000"}
    assert _found(env) == (3, 4, 1, "10.0.0.4", 6105)
    assert _found(env | {"MASTER_PORT": "7"}) == (3, 4, 1, "10.0.0.4", 7)
    assert _found(env | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}) == (3, 4, 1, "127.0.0.1", 54965)
    place = discover(env)
    assert place is not None
    assert place.environment()["NCCL_SOCKET_IFNAME"] == "^docker0,lo"
    assert _found(env | {"DLTS_JOB_ID": "1"}, _answer(3, 4, 1, "10.0.0.9")) == (3, 4, 1, "10.0.0.9", 29500)


def test_without_auto_discovery_mpi_and_slurm_do_not_count() -> None:
    assert _found(OPEN_MPI | SRUN | TORCHRUN, foreign=False) == (3, 8, 1, "head", 4321)
    assert _found(SALLOC_SHELL, foreign=False) is None
    for env, said in (
        (OPEN_MPI, "OMPI_COMM_WORLD_SIZE=4"),
        (SRUN, "SLURM_STEP_NUM_TASKS=8"),
        ({"PMIX_RANK": "1"}, "PMIX"),
    ):
        with pytest.raises(ConfigError, match=f"{said}.*auto_mpi_discovery=False"):
            discover(env, foreign=False)


# ---------------------------------------------------------------- Slurm


def test_a_step_of_srun() -> None:
    assert _found(SRUN) == (5, 8, 1, "gnode10", 12000 + 200505 % 20000)
    assert _found(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "7"}) == (5, 8, 1, "head", 7)
    assert _found(SRUN, port=8) == (5, 8, 1, "gnode10", 8)
    one_host = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "gnode20"}
    assert _found(SRUN | one_host) == (5, 8, 1, "127.0.0.1", 12505)


def test_a_step_smaller_than_the_allocation_counts_its_own_tasks() -> None:
    env = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "gnode20"}
    assert _found(env) == (1, 2, 1, "gnode20", 12505)


@pytest.mark.parametrize("env", [SBATCH, SBATCH | {"SLURM_NTASKS": "1"}, _without(SBATCH, "SLURM_PROCID")])
def test_a_process_in_an_allocation_without_srun_is_alone(env: dict[str, str]) -> None:
    assert _found(env) is None


@pytest.mark.parametrize("step", ["4294967290", "4294967291", "4294967292"])
def test_a_process_in_a_shell_that_slurm_opened_is_alone(step: str) -> None:
    env = SALLOC_SHELL | {"SLURM_STEP_ID": step}
    assert _found(env) == (0, 1, 0, "127.0.0.1", 29500)
    assert _found(_without(env, "SLURM_STEP_NUM_TASKS")) == (0, 1, 0, "127.0.0.1", 29500)


def test_srun_and_mpiexec_and_ranks_by_hand_inside_that_shell() -> None:
    step = {
        name: value
        for name, value in SRUN.items()
        if "STEP" in name or name in ("SLURM_PROCID", "SLURM_LOCALID")
    }
    assert _found(SALLOC_SHELL | step | {"PMIX_RANK": "5"}) == (5, 8, 1, "gnode10", 12505)
    assert _found(SALLOC_SHELL | MPICH | {"MASTER_ADDR": "head"}) == (3, 4, 1, "head", 29500)
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "head", "LOCAL_RANK": "0"}
    assert _found(SALLOC_SHELL | by_hand) == (1, 2, 0, "head", 29500)


def test_mpiexec_counts_before_the_step_that_started_its_helper() -> None:
    """Hydra starts one helper per host with srun; the ranks inherit the helper's step."""
    helper = SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert _found(helper | MPICH | {"MASTER_ADDR": "head"}) == (3, 4, 1, "head", 29500)
    with pytest.raises(ConfigError, match="does not say MASTER_ADDR"):
        discover(helper | MPICH, ask=_refuse)


def _refuse(why: str, instead: str) -> MpiWorld:
    raise ConfigError(f"{why}; {instead}")


def test_pmi_from_srun_itself_is_slurms() -> None:
    """srun --mpi=pmi2 sets PMI's variables too, without a local rank."""
    assert _found(SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}) == (5, 8, 1, "gnode10", 12505)


@given(st.integers(1, 2**31), st.integers(0, 100), st.integers(1, 200))
def test_jobs_and_steps_near_each_other_have_ports_of_their_own(job: int, step: int, further: int) -> None:
    def port(job: int, step: int) -> int:
        found = launchers.slurm_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        assert found is not None
        return found

    assert 12000 <= port(job, step) < 32000
    assert port(job, step) not in (
        port(job + further, step),
        port(job, step + further),
        port(job + further, 0),
    )


def test_arguments_override_the_environment() -> None:
    assert _found(TORCHRUN, rank=0) == (0, 8, 1, "head", 4321)
    assert _found(TORCHRUN, rank=0, world_size=2) == (0, 2, 1, "head", 4321)
    assert _found({}, rank=1, world_size=2, address_needed=False) == (1, 2, None, None, 29500)
    assert _found(OPEN_MPI, _answer(3, 4, 1, "h"), rank=3, world_size=4) == (3, 4, 1, "h", 29500)
    with pytest.raises(
        ConfigError, match=r"rank=1 \(argument\), world_size=2 \(argument\) is set but MASTER_ADDR"
    ):
        discover({}, rank=1, world_size=2)
    with pytest.raises(ConfigError, match=r"rank=2 \(argument\), world_size=2 \(argument\): rank 2 cannot"):
        discover({}, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="distributed_port=70000 is not a port"):
        discover(_without(TORCHRUN, "MASTER_PORT"), port=70000)


VARIABLES = sorted(
    {
        *TORCHRUN,
        *OPEN_MPI,
        *MPICH,
        *MVAPICH2,
        *SALLOC_SHELL,
        "SLURM_HET_SIZE",
        "TORCHELASTIC_RUN_ID",
        "LOCAL_WORLD_SIZE",
    }
)


@given(st.dictionaries(st.sampled_from(VARIABLES), st.sampled_from(["0", "1", "2", "4", "x", "", "n[1-2]"])))
def test_every_environment_gives_a_place_that_is_possible_or_one_sentence(env: dict[str, str]) -> None:
    before = dict(env)
    try:
        place = discover(env, ask=_refuse)
    except ConfigError as error:
        message, place = str(error), None
    else:
        message = ""
    assert "\n" not in message
    assert env == before
    if place is not None:
        assert 0 <= place.rank < place.world_size
        assert place.local_rank is not None
        assert 0 <= place.local_rank < place.world_size
        assert place.master_addr
        assert discover(place.environment(), ask=_never) == Place(
            place.rank, place.world_size, place.local_rank, place.master_addr, place.master_port,
            f"RANK={place.rank}, WORLD_SIZE={place.world_size}",
        )  # fmt: skip
