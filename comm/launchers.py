"""What mpiexec, mpirun and srun say in the environment about the process that they started.

Reads variables and judges each launcher for itself; who counts when several speak is decided in
discovery.py. Asks nobody: no MPI, no scontrol, no network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from xtrain.base.errors import ConfigError
from xtrain.comm import hostlist

Environment = Mapping[str, str]

# Ports of Slurm jobs: below those that Linux gives to outgoing connections (32768 and up).
SLURM_PORTS = range(12000, 32000)
_STEP_STRIDE = 7919  # ports between the steps of a job, so that the next jobs' first steps stay free

# Slurm's numbers for "steps" that nobody started with srun: the shell of salloc, the batch script and
# what adopts other processes (slurm.h: SLURM_INTERACTIVE_STEP, SLURM_BATCH_SCRIPT, SLURM_EXTERN_CONT).
_LONE_STEPS = (0xFFFFFFFA, 0xFFFFFFFB, 0xFFFFFFFC)

_AZUREML_PORT, _AZUREML_PORT_ONE_HOST = 6105, 54965


@dataclass(frozen=True)
class Launched:
    """What one launcher says. None: it does not say that."""

    launcher: str
    rank: int
    size: int
    local_rank: int | None
    one_host: bool
    said: str
    is_mpi: bool = False
    port: int | None = None
    find_address: Callable[[], str | None] = lambda: None
    extra: Mapping[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------- reading variables


def integer(env: Environment, *names: str, least: int = 0) -> int | None:
    """The value of the first of the variables that is set; None when none is."""
    for name in names:
        if name in env:
            text = env[name].strip()
            if not (text.isascii() and text.isdigit()) or int(text) < least:
                raise ConfigError(f"{name}={env[name]!r} is not a whole number of at least {least}")
            return int(text)
    return None


def said(env: Environment, *names: str) -> str:
    """The variables that are set, as one would type them."""
    return ", ".join(f"{name}={env[name]}" for name in names if name in env)


def check_rank(rank: int, size: int, by: str) -> None:
    """Refuse a rank that is none of `size` ranks."""
    if rank >= size:
        raise ConfigError(f"{by}: rank {rank} cannot be one of {size} (ranks count from 0)")


# ---------------------------------------------------------------- MPI


@dataclass(frozen=True)
class _Family:
    """The variables of one kind of MPI; where there are two names, the first one that is set counts."""

    name: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


_FAMILIES = (
    _Family(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Family(
        "MVAPICH2",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Family(
        "MPICH or Intel MPI",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
)


def _of_family(env: Environment, family: _Family) -> Launched | None:
    rank, size = integer(env, family.rank), integer(env, family.size, least=1)
    if rank is None and size is None:
        return None
    by = said(env, family.rank, family.size)
    if rank is None or size is None:
        missing = family.rank if rank is None else family.size
        raise ConfigError(f"{by} is set but {missing} is not: {family.name}'s mpiexec sets both; unset it")
    check_rank(rank, size, by)
    local_rank = integer(env, *family.local_rank)
    local_size = integer(env, *family.local_size, least=1)
    if local_rank is not None and local_rank >= (local_size or size):
        local = said(env, *family.local_rank, *family.local_size, family.size)
        raise ConfigError(f"{local}: a host's ranks count from 0")
    return Launched(family.name, rank, size, local_rank, local_size == size, by, is_mpi=True)


def _azureml(env: Environment, told: Launched) -> Launched:
    """Add Azure ML's address, port and network interface to what its Open MPI says, as DeepSpeed does."""
    if "AZUREML_EXPERIMENT_ID" not in env or "DLTS_JOB_ID" in env or told.launcher != "Open MPI":
        return told
    host = env.get("AZ_BATCH_MASTER_NODE", "").split(":")[0]
    return replace(
        told,
        port=_AZUREML_PORT_ONE_HOST if told.one_host else _AZUREML_PORT,
        find_address=lambda: host or None,
        extra={"NCCL_SOCKET_IFNAME": env.get("NCCL_SOCKET_IFNAME", "^docker0,lo")},
    )


def mpi_launched(env: Environment) -> Launched | None:
    """What mpiexec's or mpirun's variables say; None when there are none.

    Raises:
        ConfigError: they are incomplete, or two kinds of MPI say different things.
    """
    found = [told for family in _FAMILIES if (told := _of_family(env, family)) is not None]
    for other in found[1:]:
        if (other.rank, other.size) != (found[0].rank, found[0].size):
            raise ConfigError(
                f"two MPI launchers contradict each other ({found[0].said}; {other.said}): "
                "unset the variables of the one that did not start this process"
            )
    return _azureml(env, found[0]) if found else None


# ---------------------------------------------------------------- Slurm


def slurm_launched(env: Environment) -> Launched | None:
    """What srun's variables say; None outside a job step.

    SLURM_NTASKS describes the allocation and is also there for a lone process in `sbatch` or `salloc`;
    only a step's own variables count. The shell that `salloc` opens is a step too, with a number of its
    own: a process in it is alone.

    Source: https://slurm.schedmd.com/srun.html (output environment variables)
    """
    step = integer(env, "SLURM_STEP_ID", "SLURM_STEPID")
    if step is None:
        return None
    if step in _LONE_STEPS:
        return Launched("Slurm", 0, 1, 0, True, said(env, "SLURM_STEP_ID", "SLURM_STEPID"))
    sizes = [name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") if name in env][:1]
    rank, size = integer(env, "SLURM_PROCID"), integer(env, *sizes, least=1)
    if rank is None or size is None:
        missing = "SLURM_PROCID" if rank is None else "SLURM_STEP_NUM_TASKS"
        raise ConfigError(
            f"SLURM_STEP_ID={step} is set but {missing} is not: srun sets both; unset SLURM_STEP_ID for a lone process"
        )
    by = said(env, "SLURM_PROCID", *sizes)
    check_rank(rank, size, by)
    local_rank, nodes = integer(env, "SLURM_LOCALID"), integer(env, "SLURM_STEP_NUM_NODES", least=1)
    if local_rank is not None and local_rank > rank:
        raise ConfigError(f"{said(env, 'SLURM_LOCALID')} with {by}: a host's ranks count from 0")
    return Launched(
        "Slurm",
        rank,
        size,
        local_rank,
        one_host=nodes == 1,
        said=by,
        port=slurm_port(env),
        find_address=lambda: slurm_address(env),
    )


def slurm_address(env: Environment) -> str:
    """The host of a step's rank 0: the first of its node list.

    Raises:
        ConfigError: the list is missing or unreadable, or need not begin with rank 0's host.
    """
    open_questions = {
        "SLURM_HET_SIZE": (integer(env, "SLURM_HET_SIZE") or 1) > 1,
        "SLURM_DISTRIBUTION": "arbitrary" in env.get("SLURM_DISTRIBUTION", ""),
    }
    for variable, is_open in open_questions.items():
        if is_open:
            raise ConfigError(
                f"{variable}={env[variable]} leaves open on which host rank 0 is: "
                "set MASTER_ADDR and MASTER_PORT before srun"
            )
    for variable in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if env.get(variable):
            try:
                return next(hostlist.expand(env[variable]))
            except ConfigError as error:
                raise ConfigError(f"{variable}: {error}; set MASTER_ADDR before srun") from error
    raise ConfigError(
        "SLURM_STEP_NODELIST is not set, so rank 0's host is unknown: set MASTER_ADDR before srun"
    )


def slurm_port(env: Environment) -> int | None:
    """A port for a job step: the same on its ranks, another for other jobs and steps on the same hosts."""
    job = integer(env, "SLURM_JOB_ID", "SLURM_JOBID")
    if job is None:
        return None
    step = integer(env, "SLURM_STEP_ID", "SLURM_STEPID") or 0
    return SLURM_PORTS[(job + _STEP_STRIDE * step) % len(SLURM_PORTS)]


def launched(env: Environment) -> Launched | None:
    """What the launcher says; None for a process that has none, or only torchrun.

    mpiexec counts before Slurm, because it starts its helpers with srun and their step numbers reach the
    ranks. Where both agree, Slurm has more to say.
    """
    mpi, slurm = mpi_launched(env), slurm_launched(env)
    if mpi is not None and slurm is not None and (mpi.rank, mpi.size) == (slurm.rank, slurm.size):
        return slurm
    return mpi or slurm
