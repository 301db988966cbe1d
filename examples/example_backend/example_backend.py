"""A made-up chip, "example": what a backend for xtrain looks like when a vendor ships it.

It computes on the host, so that it runs anywhere, and pretends to a chip's limits. To write your own, copy this
package, replace the answers, and run `python -m tests.backends.contract NAME` from a checkout of xtrain until all
checks pass. A facet that you leave out keeps the answers of `xtrain.backends.backend`, which suit host memory and gloo.
A chip whose torch module answers as torch.cuda does takes `xtrain.backends.DeviceRuntime` instead of `RuntimeFacet`
and only says its `device_type` and why it may be unavailable: see xtrain/backends/ascend.py.
"""

from __future__ import annotations

import os

import torch

from xtrain.backends import Backend, PrecisionFacet, RuntimeFacet, ZeroFacet
from xtrain.base.errors import BackendError


class ExampleRuntime(RuntimeFacet):
    """EXAMPLE_DEVICES devices (default 4), of which EXAMPLE_VISIBLE_DEVICES may hide some."""

    device_type = "cpu"  # a real chip: what torch.device() calls it
    visible_devices_variables = ("EXAMPLE_VISIBLE_DEVICES",)

    def unavailable_reason(self) -> str | None:
        # One sentence for a person: what is missing, and what to do about it.
        return (
            None if self.device_count() else "EXAMPLE_DEVICES is 0: set it to the number of pretended devices"
        )

    def taken_unasked(self) -> bool:
        return False  # a real chip leaves this out: being there is reason enough to be used

    def device_count(self) -> int:
        visible = os.environ.get("EXAMPLE_VISIBLE_DEVICES")
        count = int(os.environ.get("EXAMPLE_DEVICES", "4"))
        return count if visible is None else min(count, len(visible.split(",")))

    def device(self, local_rank: int) -> torch.device:
        if local_rank >= self.device_count():
            raise BackendError(
                f"local rank {local_rank} has no device of its own: there are {self.device_count()}"
            )
        return torch.device("cpu")


class ExamplePrecision(PrecisionFacet):
    """No float16: a config with fp16.enabled trains in float32, and the log says so."""

    native_dtypes = frozenset({torch.float32, torch.bfloat16})
    stand_ins = {torch.float16: torch.float32}
    accumulation_dtype = torch.float32  # micro-batches of bfloat16 gradients are added up in it
    norm_dtype = torch.float64  # only a dtype that the chip adds in


class ExampleZero(ZeroFacet):
    """Parameters start at multiples of 256 bytes; small buckets, because the made-up link has little latency."""

    alignment_bytes = 256
    reduce_bucket_bytes = 4 * 2**20
    update_chunk = 32768


class ExampleBackend(Backend):
    name = "example"
    runtime = ExampleRuntime()
    precision = ExamplePrecision()
    zero = ExampleZero()
