"""`deepspeed.pipe`: classes that scripts import at their top; constructing one says what to do instead."""

from torch import nn

from xtrain.base.stand_ins import refused_class
from xtrain.deepspeed_api.compat import packages

PipelineModule = refused_class("pipe.PipelineModule", nn.Module)
LayerSpec = refused_class("pipe.LayerSpec")
TiedLayerSpec = refused_class("pipe.TiedLayerSpec", LayerSpec)

__all__ = ["LayerSpec", "PipelineModule", "TiedLayerSpec"]

__getattr__ = packages.attributes(__name__)
