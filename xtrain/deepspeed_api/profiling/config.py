"""`deepspeed.profiling.config`: the section `flops_profiler` as an object."""

from xtrain.config.instruments import FlopsProfilerConfig as DeepSpeedFlopsProfilerConfig

__all__ = ["DeepSpeedFlopsProfilerConfig"]
