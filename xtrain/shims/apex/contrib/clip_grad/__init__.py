"""`apex.contrib.clip_grad`: torch's own clipping, which apex only makes faster."""

from torch.nn.utils import clip_grad_norm_

__all__ = ["clip_grad_norm_"]
