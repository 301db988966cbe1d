"""`deepspeed.utils.pin_memory`: host memory that the operating system may not swap out, without an accelerator."""

from xtrain.backends.locked_memory import (
    NativePinnedMemory,
    get_active_native_pinned_memory,
    get_native_pinned_memory,
)

__all__ = ["NativePinnedMemory", "get_active_native_pinned_memory", "get_native_pinned_memory"]
