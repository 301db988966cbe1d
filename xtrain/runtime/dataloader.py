"""`deepspeed.runtime.dataloader`: see xtrain.dataloader."""

from xtrain.dataloader import RepeatingLoader

__all__ = ["RepeatingLoader"]
