"""`deepspeed.runtime.activation_checkpointing.config`: the section as an object."""

from xtrain.config.schema import ActivationCheckpointingConfig as DeepSpeedActivationCheckpointingConfig

__all__ = ["DeepSpeedActivationCheckpointingConfig"]
