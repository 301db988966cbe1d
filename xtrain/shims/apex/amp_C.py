"""`amp_C`: apex's operations on lists of tensors, in PyTorch.

Each takes `chunk_size` (apex's kernels need it; here it has no meaning), `noop_flag` (an int32 tensor of one element)
and `tensor_lists`, and works in place. Math is in float32, for float64 tensors in float64 (apex: float32). The flag is
set to 1, and never cleared, where apex does so; it is read by those operations only that apex then skips, and reading
it waits for the device.
"""

from __future__ import annotations

from xtrain.shims.apex.kernels.adam import (
    multi_tensor_adam,
    multi_tensor_adam_capturable,
    multi_tensor_adam_capturable_master,
)
from xtrain.shims.apex.kernels.lamb import (
    multi_tensor_lamb,
    multi_tensor_lamb_mp,
    multi_tensor_lamb_stage1_cuda,
    multi_tensor_lamb_stage2_cuda,
)
from xtrain.shims.apex.kernels.lists import multi_tensor_axpby, multi_tensor_scale, update_scale_hysteresis
from xtrain.shims.apex.kernels.norms import (
    multi_tensor_l2norm,
    multi_tensor_l2norm_mp,
    multi_tensor_l2norm_scale,
    multi_tensor_unscale_l2norm,
)
from xtrain.shims.apex.kernels.steps import multi_tensor_adagrad, multi_tensor_novograd, multi_tensor_sgd

__all__ = [
    "multi_tensor_adagrad",
    "multi_tensor_adam",
    "multi_tensor_adam_capturable",
    "multi_tensor_adam_capturable_master",
    "multi_tensor_axpby",
    "multi_tensor_l2norm",
    "multi_tensor_l2norm_mp",
    "multi_tensor_l2norm_scale",
    "multi_tensor_lamb",
    "multi_tensor_lamb_mp",
    "multi_tensor_lamb_stage1_cuda",
    "multi_tensor_lamb_stage2_cuda",
    "multi_tensor_novograd",
    "multi_tensor_scale",
    "multi_tensor_sgd",
    "multi_tensor_unscale_l2norm",
    "update_scale_hysteresis",
]
