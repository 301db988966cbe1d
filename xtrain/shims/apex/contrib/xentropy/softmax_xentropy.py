"""Cross entropy of each row, computed in float32."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from xtrain.shims.apex.kernels.lists import wide


class SoftmaxCrossEntropyLoss:
    """Scripts call `.apply`; the loss is not reduced."""

    @staticmethod
    def apply(
        logits: torch.Tensor,
        labels: torch.Tensor,
        smoothing: float = 0.0,
        padding_idx: int = 0,
        half_to_float: bool = False,
    ) -> torch.Tensor:
        """The loss of each row; 0, also for its gradient, where the label is `padding_idx`.

        Args:
            logits: [rows, classes].
            labels: [rows], of classes.
            smoothing: the share of the loss that goes to all classes alike.
            half_to_float: losses are float32, else in the dtype of the logits.
        """
        losses = F.cross_entropy(wide(logits), labels, reduction="none", label_smoothing=smoothing)
        losses = losses.masked_fill(labels == padding_idx, 0)
        return losses if half_to_float else losses.to(logits.dtype)
