"""Import paths of `deepspeed.runtime.activation_checkpointing`."""
