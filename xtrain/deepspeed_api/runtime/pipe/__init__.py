"""`deepspeed.runtime.pipe`: topologies. Pipelines are not there; what scripts import of them stands in."""

from xtrain.deepspeed_api.compat import packages

__getattr__ = packages.attributes(__name__)
