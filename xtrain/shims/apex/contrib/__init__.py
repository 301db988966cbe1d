"""`apex.contrib`: what of it is arithmetic alone; the rest is refused by name."""

from xtrain.shims.apex import refused

__getattr__ = refused.attributes(__name__)
