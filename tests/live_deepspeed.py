"""Real DeepSpeed inside a worker rank, for tests that compare with it step by step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def live_deepspeed() -> Iterator[Any]:
    """The deepspeed module on the worker's gloo group, on host memory, compiling nothing; undone afterwards."""
    before, compiler = os.environ.get("DS_ACCELERATOR"), torch.compile
    linear = torch.nn.functional.linear  # stage 3 replaces it, for good
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Muon's functions are decorated with torch.compile, which would start a C++ compiler.
    torch.compile = lambda f=None, **_: f if f is not None else (lambda g: g)  # type: ignore[assignment]
    try:
        import deepspeed
        import deepspeed.comm.comm as ds_comm
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__.update(dict.fromkeys(deepspeed.ops.__compatible_ops__, False))
        # Of an earlier task, whose process groups are gone.
        ds_comm.cdb = deepspeed.utils.groups._WORLD_GROUP = deepspeed.utils.groups.mpu = None
        deepspeed.init_distributed("gloo", verbose=False)
        yield deepspeed
    finally:
        torch.compile = compiler
        torch.nn.functional.linear = linear
        if before is None:
            del os.environ["DS_ACCELERATOR"]
        else:
            os.environ["DS_ACCELERATOR"] = before


@contextmanager
def fresh_deepspeed() -> Iterator[None]:
    """DeepSpeed without what an earlier task of this worker left in its modules; undone afterwards."""
    import deepspeed
    import deepspeed.comm.comm as ds_comm
    from deepspeed.accelerator import real_accelerator

    ds_comm.cdb = deepspeed.utils.groups._WORLD_GROUP = deepspeed.utils.groups.mpu = None
    linear = torch.nn.functional.linear  # its zero.Init replaces it, for good
    try:
        yield
    finally:
        torch.nn.functional.linear = linear
        real_accelerator.ds_accelerator = None
