"""`deepspeed.profiling.flops_profiler.profiler`: what a forward pass costs."""

from xtrain.metrics.flops_profiler.profiler import *  # noqa: F403
