"""The training step, and who is called at it."""
