"""How much memory is in use: the lines of `memory_breakdown` and of `see_memory_usage`."""

from __future__ import annotations

import gc

from xtrain import comm
from xtrain.activation_checkpointing import random_states
from xtrain.backends import host

_GB = 2**30


def see_memory_usage(message: str, force: bool = False) -> None:
    """Print a message and the memory in use, on rank 0; the peaks then begin again, as in DeepSpeed.

    MA and Max_MA: held by tensors on the device, now and at most since the last call; CA and Max_CA: held by
    its allocator. On the host all of them are what is resident.

    Args:
        force: False does nothing, so that calls may stay in a script.
    """
    if not force or comm.get_rank() != 0:
        return
    gc.collect()
    runtime = random_states.runtime()
    use = runtime.memory()
    used, total = host.in_use()
    print(
        f"{message}\n"
        f"MA {use.allocated / _GB:.2f} GB Max_MA {use.peak_allocated / _GB:.2f} GB "
        f"CA {use.reserved / _GB:.2f} GB Max_CA {use.peak_reserved / _GB:.2f} GB\n"
        f"CPU Virtual Memory: used = {used / _GB:.2f} GB, percent = {100 * used / total:.1f}%",
        flush=True,
    )
    runtime.reset_peak_memory()
