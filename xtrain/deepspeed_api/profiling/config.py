"""`deepspeed.profiling.config`: the section `flops_profiler` as an object."""

from xtrain.config.metrics import FlopsProfilerConfig as DeepSpeedFlopsProfilerConfig

__all__ = ["DeepSpeedFlopsProfilerConfig"]
