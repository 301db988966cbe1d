"""What an agent finds on its node before anything is started, for the launcher to compare. Imports no torch."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import signal
import socket
import struct
from importlib import metadata
from pathlib import Path
from typing import Any

from xtrain.launch.devices import shown_by_system
from xtrain.version import __version__

STACKS_SIGNAL = signal.SIGRTMIN + 4
"""On which a rank writes its Python stacks into its log. Not one of those that schedulers and libraries use."""

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def host_name() -> str:
    """The node's own name."""
    return socket.gethostname()


def memory_folder() -> str | None:
    """Where files cost no disk access; None: the usual folder for temporary files."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def available_memory() -> int | None:
    """Bytes that processes can still get; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def digest(path: str) -> str | None:
    """Of a file's content; None when it is not there."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None


def interfaces() -> dict[str, str]:
    """IPv4 address of every network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has none
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _towards(peer: str) -> str | None:
    """This node's address as a peer sees it; no packet is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def own_address(node: str, peer: str | None) -> str | None:
    """The address that other nodes reach this one at; None where that cannot be told.

    Args:
        node: this one's name, as the launcher knows it.
        peer: the name of another node, if there is one.
    """
    connection = os.environ.get("SSH_CONNECTION", "").split()
    own = [connection[2]] if len(connection) == 4 else []
    if peer is not None:
        own.append(_towards(peer) or "")
    try:
        own.append(socket.gethostbyname(node))
    except OSError:
        own.append("")
    known = set(interfaces().values())
    return next((address for address in own if address in known and not address.startswith("127.")), None)


def _machine() -> str:
    """The same for all processes of a machine, whatever node they play."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def report(introduction: dict[str, Any]) -> dict[str, Any]:
    """What the launcher compares before it starts anything.

    Args:
        introduction: `node`, this one's name, and `peer`, that of another one or null; `files` whose content the
            launcher wants to know; `token`, a file that is there when the run folder is shared; `backend`.
    """
    names = interfaces()
    address = own_address(introduction["node"], introduction["peer"])
    return {
        "host": host_name(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "xtrain": __version__,
        "torch": _version("torch"),
        "address": address,
        "interface": next((name for name, own in names.items() if own == address), None),
        "interfaces": names,
        "machine": _machine(),
        "memory": available_memory(),
        "devices": shown_by_system(introduction["backend"]),
        "shared": Path(introduction["token"]).is_file(),
        "files": {path: digest(path) for path in introduction["files"]},
    }
