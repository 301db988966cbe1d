"""Memory of this process as the kernel counts it: what "device memory" means on a host.

Reads Linux's /proc. DeepSpeed's host accelerator reports the same resident size.
"""

from __future__ import annotations

from pathlib import Path

from xtrain.errors import NotImplementedYetError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")


def _bytes(path: Path, key: str) -> int:
    """The entry `key` of one of the kernel's tables, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        raise NotImplementedYetError(
            f"memory statistics of a host without {path}", "measure with your system's own tools"
        ) from None
    value = next(line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return int(value) * 1024


def resident() -> int:
    """Bytes of this process in memory now."""
    return _bytes(_STATUS, "VmRSS")


def peak_resident() -> int:
    """Largest number of bytes of this process in memory since the start or `reset_peak`."""
    return _bytes(_STATUS, "VmHWM")


def reset_peak() -> None:
    """Start a new peak from what is resident now."""
    try:
        _CLEAR.write_text("5")
    except OSError as error:
        raise NotImplementedYetError(
            f"resetting the peak of resident memory ({error})", "measure in a fresh process"
        ) from None


def total() -> int:
    """Bytes of memory that the host has."""
    return _bytes(_MEMINFO, "MemTotal")


def free() -> int:
    """Bytes that new allocations can take without swapping."""
    return _bytes(_MEMINFO, "MemAvailable")
