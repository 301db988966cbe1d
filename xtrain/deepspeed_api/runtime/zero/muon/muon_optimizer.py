"""`deepspeed.runtime.zero.muon.muon_optimizer`."""

from xtrain.ops.muon import MuonWithAuxAdam

__all__ = ["MuonWithAuxAdam"]
