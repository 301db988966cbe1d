"""Sunway processors: host tensors, MPI between ranks, one rank on each core group.

On any other Linux machine the same code runs as MPI ranks on processor cores. Detection takes it on a
Sunway machine only. Kernels of the chip come in through a hook, see `install_math`.

Environment:
    XTRAIN_CORE_GROUPS: core groups of a node; default 6 on Sunway (SW26010-Pro), else LOCAL_WORLD_SIZE. With
        neither, nothing is bound.
    XTRAIN_CORE_BINDING: `auto` (default) gives each rank its core group's cores, unless the launcher has bound
        the process already; `none` leaves the process alone.
    XTRAIN_MEMORY_BINDING: `first-touch` (default) is Linux's own policy, which suits a bound rank; `strict`
        allows memory of the core group's NUMA nodes only (needs libnuma).
    XTRAIN_SUNWAY_MATH: `module:function`, called once by each rank after it was bound.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from xtrain.backends.backend import Backend, CollectivesFacet, PrecisionFacet, RuntimeFacet, ZeroFacet
from xtrain.base.errors import BackendError
from xtrain.base.log import log_dist

CORE_GROUPS = 6
"""Of an SW26010-Pro: each has one management core, 64 compute cores and 16 GB."""
_NODES = Path("/sys/devices/system/node")


def is_sunway() -> bool:
    """Whether this machine is one."""
    return platform.machine().startswith("sw_64")


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdigit() or int(text) < 1:
        raise BackendError(f"environment variable {variable} is {text!r}: it must be a positive number")
    return int(text)


def _choice(variable: str, choices: Sequence[str]) -> str:
    value = os.environ.get(variable, choices[0])
    if value not in choices:
        raise BackendError(f"environment variable {variable} is {value!r}: choose {' or '.join(choices)}")
    return value


def core_groups() -> int | None:
    """How many parts a node's cores are split into; None when nobody says."""
    if "XTRAIN_CORE_GROUPS" in os.environ or is_sunway():
        return _number("XTRAIN_CORE_GROUPS", CORE_GROUPS)
    return _number("LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in os.environ else None


def cores_of(group: int, groups: int, cores: Sequence[int]) -> list[int]:
    """The cores of one group: an equal, consecutive share of `cores`, or one core when there are too few."""
    if groups > len(cores):
        return [cores[group % len(cores)]]
    return list(cores[group * len(cores) // groups : (group + 1) * len(cores) // groups])


def memory_nodes(cores: Sequence[int]) -> list[int]:
    """NUMA nodes that the cores belong to; empty where the kernel does not tell."""
    wanted = set(cores)
    folders = sorted(_NODES.glob("node[0-9]*"))
    return [int(f.name[4:]) for f in folders if any((f / f"cpu{core}").exists() for core in wanted)]


def bind_cores(local_rank: int) -> list[int]:
    """Keep this process on its core group's cores; returns the cores it may use."""
    allowed = sorted(os.sched_getaffinity(0))
    groups = core_groups()
    by_launcher = len(allowed) < (os.cpu_count() or 1)
    if _choice("XTRAIN_CORE_BINDING", ("auto", "none")) == "none" or groups is None or by_launcher:
        return allowed
    mine = cores_of(local_rank, groups, allowed)
    os.sched_setaffinity(0, mine)
    torch.set_num_threads(_number("OMP_NUM_THREADS", len(mine)))
    return mine


def bind_memory(cores: Sequence[int]) -> None:
    """With XTRAIN_MEMORY_BINDING=strict, allow memory of the cores' NUMA nodes only.

    Raises:
        BackendError: it was asked for, and libnuma or the kernel's tables of nodes are missing.
    """
    if _choice("XTRAIN_MEMORY_BINDING", ("first-touch", "strict")) == "first-touch":
        return
    nodes = memory_nodes(cores)
    try:
        numa = ctypes.CDLL("libnuma.so.1")
    except OSError as error:
        raise BackendError(
            f"XTRAIN_MEMORY_BINDING=strict needs libnuma, which does not load: {error}"
        ) from None
    if not nodes or numa.numa_available() < 0:
        raise BackendError(
            "XTRAIN_MEMORY_BINDING=strict needs NUMA, which this machine's kernel does not show"
        )
    numa.numa_parse_nodestring.restype = ctypes.c_void_p
    mask = ctypes.c_void_p(numa.numa_parse_nodestring(",".join(map(str, nodes)).encode()))
    numa.numa_set_membind(mask)
    numa.numa_bitmask_free(mask)


def install_math(core_group: int, cores: Sequence[int]) -> str | None:
    """Where a vendor's library of kernels plugs in; what it says it has installed, or None without one.

    XTRAIN_SUNWAY_MATH names a function `install(core_group: int, cores: Sequence[int]) -> str`. It is called once
    on each rank, before the model is placed; it starts the core group's compute cores and replaces torch's host
    kernels, for example `torch.library.Library("aten", "IMPL").impl("mm", fast_mm, "CPU")`. Contract: as accurate as
    float32 accumulation, the same bits on each call. The text that it returns (name and version) is logged.

    Raises:
        BackendError: there is no such function.
    """
    target = os.environ.get("XTRAIN_SUNWAY_MATH")
    if not target:
        return None
    module, _, name = target.partition(":")
    try:
        install = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BackendError(
            f"environment variable XTRAIN_SUNWAY_MATH is {target!r}, which must be module:function: {error}"
        ) from None
    return str(install(core_group, cores))


class SunwayRuntime(RuntimeFacet):
    """Host memory; `set_device` is where a rank takes its core group."""

    _taken: int | None = None

    def unavailable_reason(self) -> str | None:
        if sys.platform != "linux":
            return f"core groups are bound through Linux, and this is {sys.platform}"
        return None

    def taken_unasked(self) -> bool:
        return is_sunway()

    def device_count(self) -> int | None:
        return core_groups()

    def device(self, local_rank: int) -> torch.device:
        groups = core_groups()
        if groups is not None and local_rank >= groups:
            raise BackendError(
                f"local rank {local_rank} has no core group of its own: this node has {groups}; start at most {groups} "
                "ranks on it, or set XTRAIN_CORE_GROUPS"
            )
        return torch.device("cpu")

    def set_device(self, local_rank: int) -> None:
        if self._taken == local_rank:
            return  # a second engine; the kernels are there
        super().set_device(local_rank)
        cores = bind_cores(local_rank)
        bind_memory(cores)
        installed = install_math(local_rank, cores)
        self._taken = local_rank
        if len(nodes := memory_nodes(cores)) > 1:
            log_dist(
                f"local rank {local_rank} runs on cores of NUMA nodes {nodes}: part of its memory is far away",
                level=logging.WARNING,
            )
        if is_sunway() and installed is None:
            log_dist(
                "XTRAIN_SUNWAY_MATH is not set: the management cores compute, the compute cores are idle",
                ranks=[0],
                level=logging.WARNING,
            )
        if installed is not None:
            log_dist(f"kernels of the core groups: {installed}", ranks=[0])


class MpiCollectives(CollectivesFacet):
    """The process group called "mpi", which xtrain.comm registers where mpi4py is installed."""

    process_group_backend = "mpi"

    def unavailable_reason(self) -> str | None:
        # Importing mpi4py would start MPI in this process.
        if importlib.util.find_spec("mpi4py") is None:
            return "mpi4py is not installed: pip install 'xtrain[mpi]', or mpi4py alone where there is an MPI"
        return None


class SunwayPrecision(PrecisionFacet):
    """float16 and bfloat16 are storage: products and gradients are added up in float32.

    That is also what travels, since MPI adds neither of the two.
    """

    native_dtypes = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
    norm_dtype = torch.float64
    accumulation_dtype = torch.float32


class SunwayZero(ZeroFacet):
    """Transfers between memory and the compute cores' own run at full speed from 128-byte boundaries; a core group
    has 16 GB."""

    alignment_bytes = 128
    reduce_bucket_bytes = 16 * 2**20
    update_chunk = 65536


class SunwayBackend(Backend):
    name = "sunway"
    runtime = SunwayRuntime()
    collectives = MpiCollectives()
    precision = SunwayPrecision()
    zero = SunwayZero()
