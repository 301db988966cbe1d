"""The host's processor, its memory and that of this process, as the operating system reports them."""

from __future__ import annotations

import os
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path

_PROCESS, _HOST = Path("/proc/self/status"), Path("/proc/meminfo")


def _fields(path: Path) -> dict[str, int]:
    """The sizes that a file of /proc lists, in bytes; none where there is no /proc."""
    if not path.exists():
        return {}
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}


def resident() -> tuple[int, int]:
    """(memory in use by this process, its peak since `reset_peak`), in bytes.

    Without /proc both are the peak since the process started.
    """
    fields = _fields(_PROCESS)
    if "VmRSS" in fields:
        return fields["VmRSS"], max(fields["VmRSS"], fields["VmHWM"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def reset_peak() -> None:
    """Let the peak begin again at what is in use now, where the operating system can."""
    with suppress(OSError):  # not Linux, or a sandbox forbids it: the peak stays that since the start
        Path("/proc/self/clear_refs").write_text("5")


def in_use() -> tuple[int, int]:
    """(memory in use by everything on this host, all there is), in bytes."""
    fields = _fields(_HOST)
    if "MemAvailable" in fields:
        return fields["MemTotal"] - fields["MemAvailable"], fields["MemTotal"]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return resident()[0], total


def processor() -> str:
    """The processor's name, as far as the operating system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "cpu model") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
