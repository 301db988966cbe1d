"""`deepspeed.profiling.flops_profiler`: what a forward pass costs, module by module."""

from xtrain.metrics.flops_profiler.profiler import FlopsProfiler, get_model_profile  # noqa: F401
from xtrain.metrics.flops_profiler.units import *  # noqa: F403
