"""Finds out who this process is: rank, world size, local rank, and where rank 0 listens.

Reads an environment that is passed in and never changed, and asks MPI (through mpi4py) only for what
the environment does not say. What contradicts itself is an error that names the variables: a wrong
guess would leave all ranks waiting for each other. Starts no process group and imports no torch.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from xtrain.base.errors import ConfigError
from xtrain.comm.launchers import Environment, Launched, check_rank, integer, launched, said

DEFAULT_PORT = 29500
LOOPBACK = "127.0.0.1"
_ALL_FIVE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SET_ALL = f"set {', '.join(_ALL_FIVE)} on every rank"

Ask = Callable[[str, str], "MpiWorld"]


@dataclass(frozen=True)
class Place:
    """Where a process stands in its job. What nobody said, and nobody needs, is None."""

    rank: int
    world_size: int
    local_rank: int | None
    master_addr: str | None
    master_port: int | None
    source: str
    extra: Mapping[str, str] = field(default_factory=dict)
    one_host: bool = field(default=False, compare=False)
    """Whether it is known that all ranks are on one host, which other launchers say otherwise or not at all."""

    def environment(self) -> dict[str, str]:
        """The place as torchrun would put it into the environment."""
        values = (self.rank, self.world_size, self.local_rank, self.master_addr, self.master_port)
        known = {name: str(value) for name, value in zip(_ALL_FIVE, values, strict=True) if value is not None}
        return known | dict(self.extra)


@dataclass(frozen=True)
class MpiWorld:
    """What MPI itself says: this rank, the number of ranks, the rank on its host, rank 0's address."""

    rank: int
    size: int
    local_rank: int
    address: str


@dataclass(frozen=True)
class _Who:
    """Rank and world size, the launcher that knows this process, and whether the caller named the rank."""

    rank: int
    size: int
    said: str
    told: Launched | None
    by_argument: bool


# ---------------------------------------------------------------- asking MPI


def _own_address() -> str:
    """An address of this host that others can reach: its first one, as `hostname -I` lists them."""
    try:
        listed = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):  # another system's hostname has no -I
        listed = []
    if listed:
        return listed[0]
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return socket.gethostname()


def ask_mpi(why: str, instead: str) -> MpiWorld:
    """Ask MPI through mpi4py. Collective over all ranks that mpiexec started.

    Args:
        why: what the environment lacks; begins the error when mpi4py cannot answer.
        instead: what else helps; ends that error.

    Raises:
        ConfigError: mpi4py is absent or finds no MPI library.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: a wheel without an MPI library
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{why}, and mpi4py cannot be asked ({reason}): install mpi4py for the MPI whose mpiexec starts "
            f"this, or {instead}"
        ) from error
    world = MPI.COMM_WORLD
    rank = world.Get_rank()
    address = world.bcast(_own_address() if rank == 0 else None, root=0)
    hosts = world.allgather(MPI.Get_processor_name())
    return MpiWorld(rank, world.Get_size(), hosts[:rank].count(hosts[rank]), address)


def _other_mpi(by: str, world: MpiWorld) -> ConfigError:
    return ConfigError(
        f"mpi4py finds rank {world.rank} of {world.size} where {by}: it was built for another MPI than the one whose "
        f"mpiexec started this, or no mpiexec did; install mpi4py for that MPI, or {_SET_ALL}"
    )


# ---------------------------------------------------------------- who


def _launcher(env: Environment) -> Launched | None:
    """The launcher's words. A complete environment needs none, so that broken ones do not matter there."""
    try:
        return launched(env)
    except ConfigError:
        if all(name in env for name in _ALL_FIVE):
            return None
        raise


def _who(env: Environment, told: Launched | None, rank: int, world_size: int) -> _Who | None:
    """Rank and world size from the arguments, from RANK and WORLD_SIZE, or from the launcher."""
    named = integer(env, "RANK") if rank < 0 else rank
    size = integer(env, "WORLD_SIZE", least=1) if world_size < 0 else world_size
    if named is None and size is None:
        return None if told is None else _Who(told.rank, told.size, told.said, told, by_argument=False)
    parts = (
        f"rank={rank} (argument)" if rank >= 0 else said(env, "RANK"),
        f"world_size={world_size} (argument)" if world_size >= 0 else said(env, "WORLD_SIZE"),
    )
    by = ", ".join(part for part in parts if part)
    by_argument = rank >= 0 or world_size >= 0
    if told is not None and told.size > 1 and not by_argument and _contradicts(env, told, named, size):
        raise ConfigError(
            f"{by} contradicts {told.launcher}, which started this process with {told.said}: unset "
            f"RANK and WORLD_SIZE, or {_SET_ALL}"
        )
    if told is not None and (named in (None, told.rank)) and (size in (None, told.size)):
        named, size = told.rank, told.size
    else:
        told = None  # an outer launcher, which knows nothing of this process
    if named is None or size is None:
        missing = "RANK" if named is None else "WORLD_SIZE"
        raise ConfigError(f"{by} is set but {missing} is not: set both, or neither for a lone process")
    check_rank(named, size, by)
    return _Who(named, size, by, told, by_argument)


def _contradicts(env: Environment, told: Launched, rank: int | None, size: int | None) -> bool:
    """Whether RANK and WORLD_SIZE cannot be meant for a process that the launcher counts as it does.

    torchrun's ranks under mpiexec or srun are numbered apart from their parent's. A complete environment
    of another size is somebody's own launcher inside the first one.
    """
    if "TORCHELASTIC_RUN_ID" in env:
        return False
    if size is not None and size != told.size:
        return not all(name in env for name in _ALL_FIVE)
    return rank is not None and rank != told.rank


# ---------------------------------------------------------------- where


def _port(env: Environment, told: Launched | None, port: int) -> int:
    stated = integer(env, "MASTER_PORT", least=1)
    if stated is None and told is not None and told.port is not None and port == DEFAULT_PORT:
        stated = told.port
    stated = port if stated is None else stated
    if not 0 < stated <= 65535:
        raise ConfigError(
            f"{said(env, 'MASTER_PORT') or f'distributed_port={stated}'} is not a port (1 to 65535)"
        )
    return stated


def _local_rank(env: Environment, who: _Who, one_host: bool) -> int | None:
    local_rank = integer(env, "LOCAL_RANK")
    if local_rank is not None and local_rank >= who.size:
        raise ConfigError(f"{said(env, 'LOCAL_RANK')} with {who.said}: a host has no more ranks than the job")
    if local_rank is None and who.told is not None:
        local_rank = who.told.local_rank
    if local_rank is None and (one_host or env.get("MASTER_ADDR") in (LOOPBACK, "localhost")):
        local_rank = who.rank
    return local_rank


def _address(env: Environment, who: _Who, one_host: bool) -> str | None:
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"]
    if one_host:
        return LOOPBACK
    return None if who.told is None else who.told.find_address()


def _located(env: Environment, who: _Who, port: int, address_needed: bool, ask: Ask) -> Place:
    """Add local rank, address and port to a known rank and world size."""
    told = who.told
    one_host = who.size == 1 or integer(env, "LOCAL_WORLD_SIZE") == who.size
    one_host = one_host or (told is not None and told.one_host)
    local_rank = _local_rank(env, who, one_host)
    address = _address(env, who, one_host) if address_needed else env.get("MASTER_ADDR")
    no_address = address_needed and address is None
    if told is not None and told.is_mpi and (local_rank is None or no_address):
        missing = ["MASTER_ADDR"] * no_address + ["LOCAL_RANK"] * (local_rank is None)
        names = " and ".join(missing)
        world = ask(f"{told.launcher} ({who.said}) does not say {names}", f"set {names} on every rank")
        if (world.rank, world.size) != (who.rank, who.size):
            raise _other_mpi(who.said, world)
        local_rank = world.local_rank if local_rank is None else local_rank
        address, no_address = address or world.address, False
    if local_rank is None and not who.by_argument:
        raise ConfigError(
            f"{who.said} is set but LOCAL_RANK is not: set it to this rank's number on its host (0 if alone there)"
        )
    if no_address:
        raise ConfigError(f"{who.said} is set but MASTER_ADDR is not: set it to the host of rank 0")
    source = who.said if told is None else f"{told.launcher}, {told.said}"
    extra = {} if told is None else told.extra
    # An address that only this host reaches has no ranks on others.
    one_host = one_host or address in (LOOPBACK, "localhost")
    return Place(who.rank, who.size, local_rank, address, _port(env, told, port), source, extra, one_host)


# ---------------------------------------------------------------- all together


def discover(
    env: Environment,
    *,
    rank: int = -1,
    world_size: int = -1,
    port: int = DEFAULT_PORT,
    foreign: bool = True,
    address_needed: bool = True,
    ask: Ask = ask_mpi,
) -> Place | None:
    """The place of this process; None for a process that nothing started as one of several.

    Args:
        env: the environment; only read.
        rank, world_size: override what the environment says; -1 asks it.
        port: rank 0's port where MASTER_PORT is not set. Anything but the default also overrides the
            port that follows from a Slurm job's number.
        foreign: whether launchers other than torchrun may answer.
        address_needed: False when the ranks meet elsewhere (a file, an address in the script).
        ask: how MPI is asked.

    Raises:
        ConfigError: variables contradict each other, are incomplete, or are no numbers.
    """
    told = _launcher(env)
    unsaid = rank < 0 and world_size < 0 and "RANK" not in env and "WORLD_SIZE" not in env
    by_pmix = unsaid and told is None and "PMIX_RANK" in env
    if not foreign:
        if by_pmix or (unsaid and told is not None and told.size > 1):
            raise ConfigError(
                f"a launcher started this process with {told.said if told else said(env, 'PMIX_RANK')}, but RANK and "
                "WORLD_SIZE are not set and auto_mpi_discovery=False: set them, or leave auto_mpi_discovery on"
            )
        told, by_pmix = None, False
    if by_pmix:
        return _pmix(env, port, ask)
    who = _who(env, told, rank, world_size)
    if who is not None:
        return _located(env, who, port, address_needed, ask)
    if integer(env, "LOCAL_RANK"):
        raise ConfigError(
            f"{said(env, 'LOCAL_RANK')} is set but RANK and WORLD_SIZE are not: set all three, or none"
        )
    return None


def _pmix(env: Environment, port: int, ask: Ask) -> Place:
    """PMIx names the rank in the environment and nothing else."""
    by = said(env, "PMIX_RANK")
    world = ask(f"{by} does not say how many ranks there are", _SET_ALL)
    if world.rank != integer(env, "PMIX_RANK"):
        raise _other_mpi(by, world)
    address = env.get("MASTER_ADDR") or world.address
    return Place(world.rank, world.size, world.local_rank, address, _port(env, None, port), f"MPI, {by}")
