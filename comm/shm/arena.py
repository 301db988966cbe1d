"""Memory of this process that the other processes of its host map and read in place. Knows no groups and no tensors'
meaning.

A process has one arena: a sparse anonymous file (memfd) as large as the machine's memory, of which only touched pages
exist. Peers open it as /proc/PID/fd/N, so that nothing is left behind when processes are killed, and a small /dev/shm
(64 MB in many containers) is no limit. Where there is no memfd, it is a file in XTRAIN_SHM_DIR (default /dev/shm).
"""

from __future__ import annotations

import atexit
import mmap
import os
import struct
import tempfile
import threading
import uuid
import weakref
from bisect import insort
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xtrain.base.errors import BackendError

PAGE = 4096
_LEFT = struct.Struct("q")
"""The first word of an arena: 1 when its process has left in order."""


@dataclass(frozen=True)
class Address:
    """How another process finds an arena, and its owner among those that live.

    Attributes:
        started: in clock ticks since the machine's start, so that a reused process number is not mistaken.
        path: of the file; it may be gone once everybody has mapped it.
        name: different for every arena.
    """

    pid: int
    started: int
    path: str
    name: str
    size: int


def host_name() -> str:
    """The same for processes that can map each other's arenas: the running kernel and the namespace of process numbers.

    XTRAIN_SHM_HOST replaces it, for tests that pretend to have several hosts.
    """
    if pretended := os.environ.get("XTRAIN_SHM_HOST"):
        return pretended
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def started(pid: int) -> int | None:
    """When the process was started, in clock ticks; None when it is gone, or dead and not yet buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class Arena:
    """This process's arena, and the free places in it."""

    def __init__(self) -> None:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // PAGE * PAGE
        descriptor, path = _create()
        os.ftruncate(descriptor, size)
        self._map = _map(descriptor, size, path)
        own = started(os.getpid())
        assert own is not None
        self.address = Address(os.getpid(), own, path, uuid.uuid4().hex, size)
        self._file = descriptor  # what peers open belongs to it
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._base = self._bytes.ctypes.data
        self._free = [(PAGE, size)]
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()
        atexit.register(self._leave)

    def take(self, nbytes: int) -> np.ndarray:
        """Zeroed bytes at the beginning of a page; given back when nothing refers to them any more.

        Raises:
            BackendError: the arena is full.
        """
        need = -(-max(nbytes, 1) // PAGE) * PAGE
        with self._lock:
            self._collect()
            place = next((free for free in self._free if free[1] - free[0] >= need), None)
            if place is None:
                raise BackendError(
                    f"backend shm: no room for {nbytes} bytes in {self.address.size} of shared memory"
                )
            self._free.remove(place)
            if place[1] - place[0] > need:
                insort(self._free, (place[0] + need, place[1]))
        start = place[0]
        block = self._bytes[start : start + nbytes]
        weakref.finalize(block, self._give_back, start, start + need).atexit = False
        return block

    def _give_back(self, start: int, stop: int) -> None:
        """Called by the garbage collector, at any time and in any thread: takes no lock."""
        if os.getpid() != self.address.pid:
            return  # a forked child forgets its copy of a tensor; the memory is the parent's
        try:
            self._map.madvise(mmap.MADV_REMOVE, start, stop - start)  # the pages go, zeros come back
        except OSError:  # a file system that cannot
            self._bytes[start:stop] = 0
        self._returned.append((start, stop))

    def _collect(self) -> None:
        """Join what was given back to what is free."""
        while self._returned:
            insort(self._free, self._returned.popleft())
        merged: list[tuple[int, int]] = []
        for first, last in self._free:
            if merged and first == merged[-1][1]:
                merged[-1] = (merged[-1][0], last)
            else:
                merged.append((first, last))
        self._free = merged

    def zeros(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor in the arena."""
        block = self.take(elements * dtype.itemsize)
        return torch.from_numpy(block).view(dtype)

    def offset_of(self, tensor: torch.Tensor) -> int:
        """Where a contiguous tensor lies in the arena, in bytes; -1: somewhere else."""
        offset = tensor.data_ptr() - self._base
        return offset if 0 <= offset < self.address.size else -1

    def offset_of_block(self, block: np.ndarray) -> int:
        """Where a block that was taken lies."""
        return int(block.ctypes.data) - self._base

    def forget_file(self) -> None:
        """Unlink the arena's file: all peers have mapped it. Nothing to do for a memfd."""
        if not self.address.path.startswith("/proc/"):
            with suppress(FileNotFoundError):
                os.unlink(self.address.path)

    def _leave(self) -> None:
        if os.getpid() == self.address.pid:
            _LEFT.pack_into(self._map, 0, 1)
            self.forget_file()


class PeerArena:
    """Another process's arena, mapped here."""

    def __init__(self, address: Address) -> None:
        self.address = address
        try:
            descriptor = os.open(address.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise BackendError(
                f"backend shm: process {os.getpid()} cannot open the memory of process {address.pid} "
                f"({error}): ranks of one host must belong to one user; "
                "set XTRAIN_SHM_DIR=/dev/shm where /proc is closed"
            ) from error
        try:
            self._map = _map(descriptor, address.size, address.path)
        finally:
            os.close(descriptor)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def buffer(self, offset: int, nbytes: int) -> memoryview:
        """A part of it, for numbers."""
        return memoryview(self._map)[offset : offset + nbytes]

    def gone(self) -> str | None:
        """How its process has ended; None while it lives."""
        if _LEFT.unpack_from(self._map, 0)[0]:
            return f"has ended without taking part (process {self.address.pid})"
        if started(self.address.pid) != self.address.started:
            return f"has died (process {self.address.pid} was killed or crashed)"
        return None


def _create() -> tuple[int, str]:
    """A new file (descriptor, path that peers open)."""
    folder = os.environ.get("XTRAIN_SHM_DIR")
    if folder is None and hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("xtrain-shm", os.MFD_CLOEXEC)
        return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"
    return tempfile.mkstemp(prefix=f"xtrain-{os.getpid()}-", dir=folder or "/dev/shm")


def _map(descriptor: int, size: int, path: str) -> mmap.mmap:
    try:
        mapped = mmap.mmap(descriptor, size)
    except OSError as error:
        raise BackendError(
            f"backend shm: {path} cannot be mapped ({error}): is the address space limited (ulimit -v)?"
        ) from error
    with suppress(OSError):  # a kernel without huge pages for shared memory
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


_own: Arena | None = None
_peers: weakref.WeakValueDictionary[str, PeerArena] = weakref.WeakValueDictionary()


def own() -> Arena:
    """This process's arena, made at the first call (and anew in a forked child)."""
    global _own
    if _own is None or _own.address.pid != os.getpid():
        _own = Arena()
    return _own


def peer(address: Address) -> PeerArena:
    """Another process's arena, mapped once for all groups."""
    found = _peers.get(address.name)
    if found is None:
        found = _peers[address.name] = PeerArena(address)
    return found
