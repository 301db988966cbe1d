"""The four questions a backend answers, with defaults that suit host memory and gloo.

A new chip is one module with one `Backend` subclass that replaces the facets in which it differs.
Nothing here knows of engines, optimizers or launchers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from xtrain.backends import host


class MemoryUse(NamedTuple):
    """Bytes on the device: held by tensors, the peak of that, held by the allocator, the peak of that."""

    allocated: int
    peak_allocated: int
    reserved: int
    peak_reserved: int


class RuntimeFacet:
    """Which device, and its memory, random numbers and determinism switch."""

    device_type = "cpu"
    visible_devices_variables: tuple[str, ...] = ()
    """Environment variables that limit the devices a process sees."""

    def unavailable_reason(self) -> str | None:
        """One sentence saying why the backend cannot be used here; None when it can."""
        return None

    def device(self, local_rank: int) -> torch.device:
        """The device of the rank with this number on its host."""
        return torch.device(self.device_type)

    def pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """A page-locked copy of a host tensor, for fast transfers; the tensor itself where there is no device."""
        return tensor

    def get_rng_state(self) -> torch.Tensor:
        """State of the device's default generator, a uint8 tensor on the host."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restore what `get_rng_state` returned."""
        torch.set_rng_state(state)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given; the host has at once."""

    def memory(self) -> MemoryUse:
        """Memory of this process on the device. On the host: what is resident, which no allocator divides."""
        used, peak = host.resident()
        return MemoryUse(used, peak, used, peak)

    def reset_peak_memory(self) -> None:
        """Let the peaks begin again at what is in use now."""
        host.reset_peak()


class CollectivesFacet:
    """Which process-group library moves bytes between ranks."""

    process_group_backend = "gloo"
    """A name that torch.distributed.init_process_group takes."""


class PrecisionFacet:
    """Which dtypes compute natively, and in which dtype long sums are kept."""

    native_dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.bfloat16})
    norm_dtype: torch.dtype = torch.float32
    """Dtype in which squares are summed for the gradient norm."""


class ZeroFacet:
    """How states are cut and overlapped."""

    alignment_bytes = 64
    """Each parameter starts at a multiple of this in its flat buffer: kernels round by alignment."""
    reduce_bucket_bytes = 25 * 2**20
    """Size of a bucket when the config does not say: as large as PyTorch DDP's, so that several are in flight."""
    update_chunk: int | None = None
    """Elements that the norm and the optimizer work on at a time; None: all. Host caches want less than a megabyte."""
    overlap_comm = True
    """Whether buckets are reduced during backward when the config does not say."""


class Backend:
    """One accelerator: a name and four facets."""

    name = "base"
    runtime: RuntimeFacet = RuntimeFacet()
    collectives: CollectivesFacet = CollectivesFacet()
    precision: PrecisionFacet = PrecisionFacet()
    zero: ZeroFacet = ZeroFacet()

    def __repr__(self) -> str:
        return f"<xtrain backend {self.name}>"
