"""`deepspeed.runtime.pipe.topology`."""

from xtrain.base.stand_ins import refused_class
from xtrain.parallel.topology import PipeDataParallelTopology, PipeModelDataParallelTopology, ProcessTopology

PipelineParallelGrid = refused_class("runtime.pipe.topology.PipelineParallelGrid")

__all__ = [
    "PipeDataParallelTopology",
    "PipeModelDataParallelTopology",
    "PipelineParallelGrid",
    "ProcessTopology",
]
