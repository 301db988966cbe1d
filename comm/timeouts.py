"""One time-out for everything that waits for other ranks: the one that was stated.

torch keeps a time-out for each group and gives new groups its own default, 30 minutes (10 for NCCL), whatever
init_process_group was told. Here that default follows what was stated. Waits for nobody itself.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from xtrain.base.errors import ConfigError

VARIABLE = "DEEPSPEED_TIMEOUT"
_torchs = c10d.default_pg_timeout, c10d.default_pg_nccl_timeout


def default_timeout() -> timedelta:
    """How long a collective may wait: DEEPSPEED_TIMEOUT in minutes, or 10 minutes, as in DeepSpeed.

    Raises:
        ConfigError: DEEPSPEED_TIMEOUT is no whole number of minutes.
    """
    text = os.environ.get(VARIABLE, "10")
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise ConfigError(f"{VARIABLE}={text!r} is not a whole number of minutes of at least 1")
    return timedelta(minutes=int(text))


def _backends(group: Any) -> list[Any]:
    """What does the group's work, for each type of device."""
    if hasattr(group, "set_timeout") and hasattr(group, "_timeout"):  # of xtrain's own, which have no parts
        return [group]
    found = []
    for device in group._device_types:
        try:
            found.append(group._get_backend(device))
        except RuntimeError:  # "cuda" is always listed, and need not be there
            continue
    return found


def of(group: dist.ProcessGroup | None = None) -> timedelta | None:
    """How long collectives of a group (None: of all ranks) wait; None where its library does not say."""
    for backend in _backends(dist.group.WORLD if group is None else group):
        if isinstance(seconds := getattr(backend, "_timeout", None), float):
            return timedelta(seconds=seconds)
        if isinstance(stated := getattr(getattr(backend, "options", None), "_timeout", None), timedelta):
            return stated
    return None


def set_default(timeout: timedelta) -> None:
    """Of all groups that are made from now on, by torch.distributed.new_group and DeviceMesh too."""
    module: Any = c10d
    module.default_pg_timeout = timeout
    if module.default_pg_nccl_timeout is not None:  # a torch without NCCL has none
        module.default_pg_nccl_timeout = timeout


def forget() -> None:
    """torch's own defaults again."""
    module: Any = c10d
    module.default_pg_timeout, module.default_pg_nccl_timeout = _torchs


def set_everywhere(timeout: timedelta) -> None:
    """Of all groups that there are, of their store, and of later ones: a script has started them with another."""
    set_default(timeout)
    for group in list(c10d._world.pg_map):
        for backend in _backends(group):
            if hasattr(backend, "_set_default_timeout"):
                backend._set_default_timeout(timeout)
    c10d._get_default_store().set_timeout(timeout)
