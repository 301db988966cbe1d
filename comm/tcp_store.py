"""torch's TCPStore and gloo, each listening on one address: torch by itself listens on all that the host has.

For ranks that no launcher of xtrain's has given a store of its own (store/), and for groups that need C++ throughout.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
from datetime import timedelta

import torch.distributed as dist

from xtrain.base.log import log_dist

_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_BACKLOG = 4096


def is_loopback(host: str | None) -> bool:
    """Whether only this host reaches `host`, a name or an address."""
    if not host:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def keep_gloo_on_this_host() -> None:
    """All ranks are on this host: gloo listens on loopback, unless GLOO_SOCKET_IFNAME is set. Counts for this process
    and what it starts."""
    if _GLOO_INTERFACE in os.environ:
        return
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):  # Linux, macOS
            os.environ[_GLOO_INTERFACE] = name
            return
    log_dist(
        "no loopback interface lo or lo0: gloo listens on the address of this host's name; set GLOO_SOCKET_IFNAME",
        level=logging.WARNING,
    )


def _listening(host: str, port: int) -> socket.socket | None:
    """A socket bound to the address of `host`; None where it is none of this host's, or the port is taken."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(_BACKLOG)
            return bound
        except OSError as error:
            bound.close()
            if error.errno == errno.EADDRINUSE:
                # By an earlier store of this process, which torch shares, or by another program, which torch names.
                return None
    log_dist(
        f"MASTER_ADDR={host} is no address of rank 0's host: its store listens on all addresses, and whoever reaches "
        f"port {port} can change what is in it; set MASTER_ADDR to an address that rank 0 has",
        level=logging.WARNING,
    )
    return None


def open_master(host: str, port: int, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """Rank 0's store, at the address of `host` only.

    Args:
        port: 0 takes a free one; the store's `port` says which.

    Raises:
        RuntimeError: as torch says it, a port in use among others.
    """
    try:
        bound = _listening(host, port)
    except socket.gaierror as error:
        raise dist.DistNetworkError(f"MASTER_ADDR={host} cannot be resolved: {error}") from error
    # Not waiting here for the others lets `Rendezvous.join` say who is missing.
    if bound is None:
        return dist.TCPStore(host, port, world_size, True, timeout, wait_for_workers=False, multi_tenant=True)
    return dist.TCPStore(
        host,
        bound.getsockname()[1],
        world_size,
        True,
        timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=bound.detach(),  # torch's from now on
    )


def open_client(host: str, port: int, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """The other ranks' way to it.

    Raises:
        RuntimeError: as torch says it.
    """
    return dist.TCPStore(host, port, world_size, False, timeout, wait_for_workers=False)
