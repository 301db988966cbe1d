"""`deepspeed.comm.torch`: the one question of it that scripts ask. Not a backend: those are torch's own."""

from __future__ import annotations

import os

from xtrain.base.errors import NotImplementedYetError


def known_world_size(world_size: int) -> int | None:
    """The number of ranks as far as it is known before a process group exists: the argument, else WORLD_SIZE.

    Returns:
        None when the argument is -1 and the environment does not say.
    """
    if world_size != -1:
        return world_size
    stated = os.environ.get("WORLD_SIZE")
    return int(stated) if stated else None


class TorchBackend:
    """Not there: collectives go to torch.distributed without an object in between."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedYetError("comm.torch.TorchBackend", "call the functions of xtrain.comm")
