"""`deepspeed.runtime.dataloader`: see xtrain.dataloader."""

from xtrain.engine.dataloader import RepeatingLoader

__all__ = ["RepeatingLoader"]
