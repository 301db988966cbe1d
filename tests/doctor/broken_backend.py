"""Backends that misbehave as drivers and libraries do; the tests install them as a package of entry points."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from xtrain.backends import Backend, RuntimeFacet


class _Host(RuntimeFacet):
    def taken_unasked(self) -> bool:
        return False


class _Hanging(_Host):
    def set_device(self, local_rank: int) -> None:
        if local_rank == 1:
            time.sleep(600)


class _Dying(_Host):
    def set_device(self, local_rank: int) -> None:
        if local_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class _Wrong(_Host):
    """Its library loses a bit of one dtype on one rank, and refuses another."""

    def set_device(self, local_rank: int) -> None:
        theirs = dist.all_reduce

        def all_reduce(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
            if tensor.dtype == torch.bfloat16:
                raise RuntimeError("bfloat16 is not supported by the library")
            work = theirs(tensor, *args, **kwargs)
            if tensor.dtype == torch.float32 and local_rank == 1 and tensor.numel() > 3:
                tensor[3] += 1
            return work

        dist.all_reduce = all_reduce


class _Silent(_Host):
    def unavailable_reason(self) -> str | None:
        if os.environ.get("SILENT_DRIVER") == "dies":
            os.abort()
        time.sleep(600)
        return None


class Hanging(Backend):
    name, runtime = "hanging", _Hanging()


class Dying(Backend):
    name, runtime = "dying", _Dying()


class Wrong(Backend):
    name, runtime = "wrong", _Wrong()


class Silent(Backend):
    name, runtime = "silent", _Silent()
