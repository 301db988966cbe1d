"""Starting and ending the process groups, and asking who is in them."""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from xtrain.backends import registry
from xtrain.base.errors import BackendError, ConfigError, unknown_name
from xtrain.base.log import log_dist
from xtrain.comm import discovery, libraries, mpi, rendezvous, shm, tcp_store, timeouts
from xtrain.comm.launchers import launched
from xtrain.comm.timeouts import default_timeout

TORCH_DISTRIBUTED_DEFAULT_PORT = discovery.DEFAULT_PORT

_SETTLE_SECONDS = 0.1

_started: weakref.ref[dist.ProcessGroup] | None = None
"""The group of all ranks, where `init_distributed` has made it, and not the script."""
_companions: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()

is_available = dist.is_available
is_initialized = dist.is_initialized
get_global_rank = dist.get_global_rank


def get_rank(group: dist.ProcessGroup | None = None) -> int:
    """Number of this process in the group; 0 without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def get_world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes in the group; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def get_local_rank() -> int:
    """Number of this process on its host, from LOCAL_RANK, which init_distributed sets if the launcher did not."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def find_local_rank() -> int:
    """`get_local_rank` before init_distributed: what mpiexec or srun say counts, and is put into the environment
    (LOCAL_RANK, and LOCAL_WORLD_SIZE where all ranks are on one host). A rank takes its device by it.

    Raises:
        ConfigError: the launcher's variables are incomplete or contradict each other.
    """
    if "LOCAL_RANK" not in os.environ and not dist.is_initialized():
        told = launched(os.environ)
        if told is not None and told.local_rank is not None and "RANK" not in os.environ:
            os.environ["LOCAL_RANK"] = str(told.local_rank)
            if told.one_host:
                os.environ.setdefault("LOCAL_WORLD_SIZE", str(told.size))
    return get_local_rank()


def get_world_group() -> dist.ProcessGroup | None:
    """The group of all ranks; None before it exists."""
    return dist.group.WORLD


def get_all_ranks_from_group(group: dist.ProcessGroup | None = None) -> list[int]:
    """Global ranks of the group's members, in the order of their ranks in it."""
    return dist.get_process_group_ranks(group)


def initialize_mesh_device(mesh_shape: tuple[int, ...], mesh_dim_names: tuple[str, ...]) -> DeviceMesh:
    """A mesh of all ranks on the detected backend's device, with a process group for each dimension."""
    return init_device_mesh(registry.detect().runtime.device_type, mesh_shape, mesh_dim_names=mesh_dim_names)


def has_reduce_scatter_tensor() -> bool:
    """Always: every library that xtrain starts has it, like the three others that scripts ask for."""
    return True


has_all_gather_into_tensor = has_all_reduce_coalesced = has_coalescing_manager = has_reduce_scatter_tensor


def new_group(
    ranks: list[int] | None = None, timeout: timedelta | None = None, *args: Any, **kwargs: Any
) -> Any:
    """`torch.distributed.new_group`, whose time-out is that of the group of all ranks where none is given."""
    if timeout is None and dist.is_initialized():
        timeout = timeouts.of(None)
    return dist.new_group(ranks, timeout, *args, **kwargs)


def companion(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A second process group of the same ranks, for collectives whose order is independent of the first's.

    Collective over the group when it is made, which is once.
    """
    if get_world_size(group) == 1:
        return group
    parent = group or dist.group.WORLD
    assert parent is not None
    if parent not in _companions:
        ranks = None if group is None else dist.get_process_group_ranks(group)
        _companions[parent] = new_group(ranks, use_local_synchronization=group is not None)
    return _companions[parent]


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Start torch.distributed unless it is running, with `deepspeed.init_distributed`'s signature.

    Who this process is comes from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, else from
    mpiexec or srun (docs/launchers.md); those five variables are set afterwards. A lone process is rank
    0 of 1.

    Where the script has started torch.distributed itself, its groups keep their time-outs, unless one is stated here
    or by DEEPSPEED_TIMEOUT.

    Args:
        dist_backend: process-group library; None takes the one of the detected backend. "mpi" is comm/mpi, where
            the ranks are MPI's; "shm" is comm/shm, for ranks that share a host.
        auto_mpi_discovery: whether MPI's and Slurm's variables count where the five are not set.
        distributed_port: port of rank 0 when the environment has no MASTER_PORT.
        verbose: whether rank 0 logs what was found.
        timeout: how long a collective of any group may wait for the other ranks; None: see `default_timeout`.
        init_method: as in torch.distributed; None means `env://`, or no network for a world of one.
        dist_init_required: False asserts that the process group exists already.
        rank, world_size: override the environment.

    Raises:
        ConfigError: `dist_init_required` is False and no process group exists; the environment contradicts
            itself or is incomplete.
        BackendError: the process group cannot be made; says with which library, rank and address.
    """
    if dist.is_initialized():
        _state_timeout(timeout)
        return
    if dist_init_required is False:
        raise ConfigError(
            "dist_init_required=False but torch.distributed is not initialized: call init_distributed() first"
        )
    timeout = default_timeout() if timeout is None else timeout
    if not isinstance(timeout, timedelta):
        raise ConfigError(f"init_distributed(timeout={timeout!r}) must be a datetime.timedelta")
    library = dist_backend or registry.detect().collectives.process_group_backend
    if ":" not in library and library.lower() not in {*libraries.names(), *dist.Backend.backend_list}:
        raise BackendError(unknown_name("process-group library", library, libraries.names()))
    place = None
    if library.lower() == "mpi":
        mpi.start(rank, world_size, timeout, init_method)
    else:
        if library.lower() == shm.NAME:
            shm.register()
        init_method = None if init_method == "env://" else init_method
        place = _find_place(init_method, rank, world_size, distributed_port, auto_mpi_discovery)
        if place is not None:
            rank, world_size = place.rank, place.world_size
        elif init_method is None:
            rank, world_size = 0, 1
        _start(library, init_method, rank, world_size, timeout)
    _note_start(timeout)
    atexit.register(_settle)
    if verbose:
        if place is not None:
            log_dist(_found(place), ranks=[0])
        log_dist(f"torch {torch.__version__} distributed: {library}, {get_world_size()} ranks", ranks=[0])


def _note_start(timeout: timedelta) -> None:
    global _started
    timeouts.set_default(timeout)
    assert dist.group.WORLD is not None
    _started = weakref.ref(dist.group.WORLD)


def _state_timeout(timeout: timedelta | None) -> None:
    """torch.distributed runs already: give its groups the stated time-out if the script has started it."""
    by_xtrain = _started is not None and _started() is dist.group.WORLD
    if not by_xtrain and (timeout is not None or timeouts.VARIABLE in os.environ):
        timeouts.set_everywhere(default_timeout() if timeout is None else timeout)


def _find_place(
    init_method: str | None, rank: int, world_size: int, port: int, foreign: bool
) -> discovery.Place | None:
    """Who this process is, which is also put into the environment; None for a lone one, or where `init_method` says."""
    if init_method is not None and "rank" in parse_qs(urlsplit(init_method).query):
        return None
    place = discovery.discover(
        os.environ,
        rank=rank,
        world_size=world_size,
        port=port,
        foreign=foreign,
        address_needed=init_method is None,
    )
    if place is not None:
        os.environ.update(place.environment())
        if place.one_host:
            tcp_store.keep_gloo_on_this_host()
    return place


def tell_other_library(backend: str, library: str) -> None:
    """Log a warning where the process group that runs is not of the library that the backend brings."""
    running = str(dist.get_backend_config())
    if dist.get_world_size() > 1 and library not in running:
        log_dist(
            f"backend {backend!r} brings {library}, but the process group is of {running}: it was started before the "
            f'config was read; set XTRAIN_BACKEND={backend}, or call init_distributed("{library}"), for {library}',
            ranks=[0],
            level=logging.WARNING,
        )


def _start(library: str, init_method: str | None, rank: int, world_size: int, timeout: timedelta) -> None:
    """Make the process group; init_method None: at MASTER_ADDR and MASTER_PORT, or, alone, without a port."""
    alone = init_method is None and world_size == 1
    address = init_method or f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        if alone:
            store: dist.Store = dist.HashStore()
            rank = 0
            tcp_store.keep_gloo_on_this_host()
        else:
            store, rank, world_size = rendezvous.open_store(library, init_method, rank, world_size, timeout)
            store.set_timeout(timeout)
            together = rendezvous.Rendezvous(store, address, library, rank, world_size)
            together.join(timeout)
            store = together.group_store(timeout)
        dist.init_process_group(library, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except BackendError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        who = "a lone process" if alone or rank < 0 else f"rank {rank} of {world_size}"
        where = "" if alone else f" at {address}"
        raise BackendError(
            f"{who} could not start {library}{where}: {rendezvous.first_line(error)}"
        ) from error
    rendezvous.current = None if alone else together


def _found(place: discovery.Place) -> str:
    environment = ", ".join(f"{name}={value}" for name, value in place.environment().items())
    return f"ranks found through {place.source}: {environment}"


def mpi_discovery(distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT, verbose: bool = True) -> None:
    """Ask MPI, through mpi4py, for everything, and set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    Collective over all ranks that mpiexec started. `init_distributed` needs it only under an mpiexec whose
    variables it does not know.

    Raises:
        ConfigError: mpi4py is absent or finds no MPI library, or a running process group numbers the ranks
            differently.
    """
    world = discovery.ask_mpi("mpi_discovery() was called", "start with torchrun")
    place = discovery.Place(
        world.rank, world.size, world.local_rank, world.address, distributed_port, "mpi_discovery()"
    )
    if dist.is_initialized() and (get_rank(), get_world_size()) != (world.rank, world.size):
        raise ConfigError(
            f"MPI says rank {world.rank} of {world.size}, but the process group that runs says "
            f"rank {get_rank()} of {get_world_size()}: call mpi_discovery() before init_distributed(), or not at all"
        )
    os.environ.update(place.environment())
    if verbose:
        log_dist(_found(place), ranks=[0])


def _settle() -> None:
    """Give the library's threads a moment to let go of their last tensors before Python ends.

    A gloo thread that drops the last reference to a tensor needs the interpreter's lock. If it asks for
    it while the interpreter is shutting down, CPython ends that thread inside C++ code, which aborts the
    whole process (seen about once in forty two-rank runs on a busy machine, after a successful run).
    """
    if rendezvous.current is not None:
        rendezvous.current.leave()
    time.sleep(_SETTLE_SECONDS)


def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
    """End the group (None: all groups) if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group(group)
        if not dist.is_initialized():
            rendezvous.current = None
            timeouts.forget()
