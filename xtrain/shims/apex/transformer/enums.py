"""`apex.transformer.enums`: kinds of layers, attention, masks and models."""

from __future__ import annotations

import enum


class LayerType(enum.Enum):
    """Of a transformer layer."""

    encoder = 1
    decoder = 2


class AttnType(enum.Enum):
    """Where keys and values come from."""

    self_attn = 1
    cross_attn = 2


class AttnMaskType(enum.Enum):
    """What attention does not see."""

    padding = 1
    causal = 2


class ModelType(enum.Enum):
    """Which halves a model has."""

    encoder_or_decoder = 1
    encoder_and_decoder = 2
