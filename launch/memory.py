"""How much memory a rank of the built-in model needs at least, told before anything is started."""

from __future__ import annotations

from typing import Any

from xtrain.launch.schema import LaunchConfig, ModelSection


def parameters(model: ModelSection) -> int:
    """Parameters of a GLM of these sizes; the embedding is the output matrix, too."""
    hidden, ffn = model.hidden_size, model.ffn_size
    attention = 4 * hidden * hidden + 4 * hidden
    feed_forward = 3 * hidden * ffn + 2 * ffn + hidden
    norms = 4 * hidden
    return model.vocab_size * hidden + model.num_layers * (attention + feed_forward + norms)


def model_states(config: LaunchConfig, deepspeed_config: dict[str, Any], ranks: int) -> int:
    """Bytes of weights, gradients, masters and Adam's states of one rank; activations come on top.

    16 bytes a parameter, divided by the ranks as far as the ZeRO stage divides them (Rajbhandari et al., SC20).
    """
    stage = deepspeed_config.get("zero_optimization", {}).get("stage", 0)
    mixed = any(deepspeed_config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    weights, gradients = (2, 2) if mixed else (4, 4)
    states = 16 - weights - gradients
    whole = [weights if stage < 3 else 0, gradients if stage < 2 else 0, states if stage < 1 else 0]
    divided = 16 - sum(whole)
    return round(parameters(config.model) * (sum(whole) + divided / ranks))
