"""What becomes of each name of torch.cuda on the host: done (host_cuda.py), kept as it is, or refused. No torch here.

`xtrain migrate` and docs/compat.md read this; a test holds it against torch's own list.
"""

from __future__ import annotations

TENSOR_TYPES = tuple(
    f"{kind}Tensor"
    for kind in ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
)
"""`torch.cuda.FloatTensor` is `torch.FloatTensor`, and so on."""

KEPT = frozenset(
    {
        "amp", "CudaError", "cudaStatus", "DeferredCudaCallError", "has_half", "has_magma", "memory", "random",
        "streams", "AcceleratorError", "OutOfMemoryError", "sparse", "nvtx",
        *(
            f"{kind}Storage"
            for kind in ("BFloat16", "Bool", "Byte", "Char", "ComplexDouble", "ComplexFloat", "Double", "Float", "Half",
                         "Int", "Long", "Short")
        ),
    }
)  # fmt: skip
"""Classes of errors, flags that only say how torch was built, and modules whose functions are replaced one by one."""

_GRAPHS = "use torch.compile, which needs none"
_ALLOCATOR = "the host's memory is the operating system's: leave it out on this backend"
_SENSORS = "read the machine's own sensors"
_CHIP = "it speaks to NVIDIA's libraries: leave it out on this backend"
_PROFILER = "use torch.profiler"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("CUDAGraph", "graph", "graphs", "make_graphed_callables", "graph_pool_handle"), _GRAPHS),
    **dict.fromkeys(
        (
            "CUDAPluggableAllocator", "MemPool", "caching_allocator_alloc", "caching_allocator_delete",
            "caching_allocator_disabled", "caching_allocator_enable", "change_current_allocator",
            "get_allocator_backend", "get_per_process_memory_fraction", "host_memory_stats",
            "host_memory_stats_as_nested_dict", "memory_snapshot", "memory_stats_as_nested_dict",
            "reset_accumulated_host_memory_stats", "reset_accumulated_memory_stats", "reset_peak_host_memory_stats",
            "set_per_process_memory_fraction", "use_mem_pool",
        ),
        _ALLOCATOR,
    ),
    **dict.fromkeys(
        ("clock_rate", "device_memory_used", "list_gpu_processes", "memory_usage", "power_draw", "temperature",
         "utilization"),
        _SENSORS,
    ),
    **dict.fromkeys(
        ("ExternalStream", "GreenContext", "check_error", "cudart", "current_blas_handle", "current_solver_handle",
         "gds", "get_stream_from_external", "green_contexts", "set_sync_debug_mode"),
        _CHIP,
    ),
    "jiterator": "write the function in torch: it compiles CUDA source",
    "nccl": "use torch.distributed, whose \"nccl\" is the backend's own library",
    "comm": "use torch.distributed",
    "tunable": "it tunes CUDA's matrix products: leave it out on this backend",
    "profiler": _PROFILER,
}  # fmt: skip
"""Names without a meaning there, and what to do instead."""
