"""The four questions a backend answers, with defaults that suit host memory and gloo.

A new chip is one module with one `Backend` subclass that replaces the facets in which it differs; one whose
torch module answers as torch.cuda does takes its runtime from device.py. Nothing here knows of engines,
optimizers or launchers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from xtrain.backends.host import in_use, processor, reset_peak, resident


@dataclass(frozen=True)
class MemoryStatistics:
    """Bytes on one device.

    Attributes:
        allocated: in tensors now; on a host, resident memory of the process.
        peak_allocated: most of that since the start or `reset_peak_memory`.
        reserved: held by torch, in tensors or cached; on a host the same as `allocated`.
        peak_reserved: most of that.
        free: that nobody uses.
        total: that the device has.
    """

    allocated: int
    peak_allocated: int
    reserved: int
    peak_reserved: int
    free: int
    total: int


class RuntimeFacet:
    """Which device, and its memory, random numbers and determinism switch."""

    device_type = "cpu"
    visible_devices_variables: tuple[str, ...] = ()
    """Environment variables that limit the devices a process sees."""

    def unavailable_reason(self) -> str | None:
        """One sentence saying why the backend cannot be used here; None when it can."""
        return None

    def taken_unasked(self) -> bool:
        """Whether detection may choose it, when it is available and nobody has named a backend."""
        return True

    # ---------------------------------------------------------------- which device

    def device_count(self) -> int | None:
        """Devices that this process sees; None where any number of ranks share the host."""
        return None

    def device(self, local_rank: int) -> torch.device:
        """The device of the rank with this number on its host.

        Raises:
            BackendError: there are fewer devices.
        """
        return torch.device(self.device_type)

    def set_device(self, local_rank: int) -> None:
        """Make that device the current one; called before the process group exists, and may be repeated.

        Raises:
            BackendError: there are fewer devices.
        """
        self.device(local_rank)

    @property
    def host_memory(self) -> bool:
        """Whether its memory is the host's: nothing is moved or pinned, and its generator is torch's own."""
        return self.device_type == "cpu"

    def device_name(self, index: int) -> str:
        """What people call the device with this number; on a host, its processor."""
        return processor()

    def versions(self) -> dict[str, str]:
        """Name and version of the vendor's packages that the backend stands on, for `xtrain doctor`."""
        return {}

    def synchronize(self) -> None:
        """Wait until the device has done what it was given; the host has at once."""

    # ---------------------------------------------------------------- memory

    def memory(self) -> MemoryStatistics:
        """Of the current device."""
        now, peak = resident()
        used, total = in_use()
        return MemoryStatistics(now, peak, now, peak, total - used, total)

    def reset_peak_memory(self) -> None:
        """Start a new peak."""
        reset_peak()

    def pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """A page-locked copy of a host tensor, for fast transfers; the tensor itself where there is no device."""
        return tensor

    # ---------------------------------------------------------------- random numbers, determinism

    def get_rng_state(self) -> torch.Tensor:
        """State of the device's default generator, a uint8 tensor on the host."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restore what `get_rng_state` returned."""
        torch.set_rng_state(state)

    def set_deterministic(self, enabled: bool) -> None:
        """Let operations give the same bits in each run; one that cannot warns. Aligned mode switches it on."""
        torch.use_deterministic_algorithms(enabled, warn_only=True)
        # torch would also fill every new tensor, to make visible who reads what was not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class CollectivesFacet:
    """Which process-group library moves bytes between ranks."""

    process_group_backend = "gloo"
    """A name that torch.distributed.init_process_group takes."""

    def unavailable_reason(self) -> str | None:
        """One sentence saying why no process group can be made with it here; None when it can."""
        if dist.is_available() and dist.is_backend_available(self.process_group_backend):
            return None
        return f"torch.distributed has no library {self.process_group_backend!r} in this process"


class PrecisionFacet:
    """Which dtypes compute natively, in which dtype long sums are kept, and what replaces the others."""

    norm_dtype: torch.dtype = torch.float32
    """Dtype in which squares are summed for the gradient norm."""
    accumulation_dtype: torch.dtype | None = None
    """Dtype in which micro-batch gradients are added up when the config does not say; None: the parameters'."""
    initial_scale_power = 16
    """The dynamic loss scale of fp16 starts at 2 to this power when the config does not say."""

    @property
    def native_dtypes(self) -> frozenset[torch.dtype]:
        """Dtypes of parameters that the device computes in. A subclass may set a plain attribute."""
        return frozenset({torch.float32, torch.bfloat16})

    @property
    def stand_ins(self) -> Mapping[torch.dtype, torch.dtype]:
        """For a dtype that the chip lacks, the one that models are trained in instead. The rest are refused."""
        return {}

    @property
    def float32_unit(self) -> float:
        """Relative distance of the numbers that inputs of float32 products are rounded to at present: 2**-23 where
        they are exact."""
        return torch.finfo(torch.float32).eps

    @property
    def saturates(self) -> bool:
        """Whether overflow gives the largest number instead of infinity: gradients do not show it then."""
        return False

    def take_overflow(self) -> bool:
        """Where `saturates`: whether anything overflowed on this device since the last call."""
        return False

    def exact_float32(self) -> None:
        """Switch off what makes float32 arithmetic less than float32 (TF32, HF32). Aligned mode does."""


class ZeroFacet:
    """How states are cut and overlapped."""

    alignment_bytes = 64
    """What is placed in a larger block (a parameter in its flat buffer, say) starts at a multiple of this, counted from
    the block's beginning: kernels round by alignment. See alignment.py."""
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

    def prepare(self, local_rank: int, aligned: bool = False) -> None:
        """Make this rank's device the current one, before process groups and tensors are made; may be repeated.

        Args:
            aligned: bits must be the same in each run: operations are deterministic, float32 is exact.

        Raises:
            BackendError: there are more ranks on this host than devices.
        """
        self.runtime.set_device(local_rank)
        if aligned:
            self.runtime.set_deterministic(True)
            self.precision.exact_float32()

    def __repr__(self) -> str:
        return f"<xtrain backend {self.name}>"
