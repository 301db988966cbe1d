"""What the tests of the run's store share: a secret, and what listens where."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

SECRET = bytes(range(32))
_LISTENS = "0A"


def _address(text: str) -> tuple[str, int]:
    """An address as /proc/net/tcp and tcp6 write it: words of the host's byte order, in hexadecimal."""
    number, _, port = text.partition(":")
    raw = b"".join(struct.pack("=I", int(number[at : at + 8], 16)) for at in range(0, len(number), 8))
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, raw), int(port, 16)


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses at which a process of this host listens for TCP connections."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed at this moment
            inodes.add(os.readlink(link))
    found = set()
    for table in (f"/proc/{pid}/net/tcp", f"/proc/{pid}/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == _LISTENS and f"socket:[{words[9]}]" in inodes:
                found.add(_address(words[1]))
    return found


def not_loopback(addresses: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Those that other hosts may reach."""
    return {address for address in addresses if not ip_address(address[0]).is_loopback}
