"""`deepspeed.moe.layer`: the class that scripts import at their top; constructing it says what to do instead."""

from torch import nn

from xtrain.base.stand_ins import refused_class

MoE = refused_class("moe.layer.MoE", nn.Module)

__all__ = ["MoE"]
