"""`apex.contrib.xentropy`: cross entropy with smoothed labels."""

from xtrain.shims.apex.contrib.xentropy.softmax_xentropy import SoftmaxCrossEntropyLoss

__all__ = ["SoftmaxCrossEntropyLoss"]
