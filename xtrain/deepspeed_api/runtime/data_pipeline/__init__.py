"""`deepspeed.runtime.data_pipeline`: the curriculum's schedule. What else scripts import of it stands in."""

from xtrain.deepspeed_api.compat import packages

__getattr__ = packages.attributes(__name__)
