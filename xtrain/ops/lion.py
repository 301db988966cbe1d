"""DeepSpeed's Lion classes, as xtrain's one Lion."""

from xtrain.optim import Lion

FusedLion = DeepSpeedCPULion = Lion
