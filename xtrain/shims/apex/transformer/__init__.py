"""`apex.transformer`: the names that hold no parallelism; the rest is refused by name."""

from xtrain.shims.apex import refused
from xtrain.shims.apex.transformer import enums, utils
from xtrain.shims.apex.transformer.enums import AttnMaskType, AttnType, LayerType

__all__ = ["AttnMaskType", "AttnType", "LayerType", "enums", "utils"]

__getattr__ = refused.attributes(__name__)
