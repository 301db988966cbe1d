"""Sleeping until a number in shared memory changes: Linux's futex, which Python has no function for.

A waiter that only looks now and then is late when it sleeps long, and takes the processor from the rank that it
waits for when it does not. Where the number of the system call is not known, it sleeps a little.
"""

from __future__ import annotations

import ctypes
import platform
import time

_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "loongarch64": 98, "ppc64le": 221, "s390x": 238}
_NUMBER = _NUMBERS.get(platform.machine())
_WAIT, _WAKE = 0, 1
_EVERYBODY = 2**31 - 1
_NAP = 0.0002

_libc = ctypes.CDLL(None)
_call = _libc.syscall
_call.restype = ctypes.c_long
_call.argtypes = [
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
]


class _Time(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def until_changed(address: int, value: int, seconds: float) -> None:
    """Sleep while the 32 bits at `address` are `value`, but not longer than `seconds`. May return too early."""
    if _NUMBER is None:
        time.sleep(min(seconds, _NAP))
        return
    limit = _Time(int(seconds), int(seconds % 1 * 1e9))
    _call(_NUMBER, address, _WAIT, value & 0xFFFFFFFF, ctypes.addressof(limit), None, 0)


def wake(address: int) -> None:
    """Let all go on that sleep until the bits at `address` change."""
    if _NUMBER is not None:
        _call(_NUMBER, address, _WAKE, _EVERYBODY, None, None, 0)
