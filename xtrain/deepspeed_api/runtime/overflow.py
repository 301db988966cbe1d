"""Overflows and norms of gradients that a script keeps itself: part of `deepspeed.runtime.utils`.

The engine looks for overflows itself; nothing here is used by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from xtrain import comm
from xtrain.utils import groups


def is_model_parallel_parameter(p: Any) -> bool:
    """Whether Megatron has marked the parameter as divided over the tensor-parallel ranks."""
    return bool(getattr(p, "model_parallel", False) or getattr(p, "tensor_model_parallel", False))


def is_expert_parameter(p: Any) -> bool:
    """Whether each rank has other values of it: DeepSpeed's mark `allreduce = False`."""
    return not getattr(p, "allreduce", True)


def _spread(value: float, op: Any, group: Any) -> float:
    # float64: what a rank has found is not rounded on the way
    found = torch.tensor([value], dtype=torch.float64)
    comm.all_reduce(found, op, group=group)
    return float(found)


def _expert_group() -> Any:
    return groups._get_max_expert_parallel_group() if groups._get_expert_parallel_group_dict() else None


class CheckOverflow:
    """Looks for infinities and NaN in gradients, on all ranks together.

    Args:
        param_groups: lists of parameters, whose `grad` is looked at.
        mpu: with one, its model-parallel ranks answer alike.
        zero_reduce_scatter: gradients are divided over all ranks, and all answer alike.
        deepspeed: an engine, for its `enable_backward_allreduce`: if that is off, all ranks answer alike.
    """

    def __init__(
        self,
        param_groups: Iterable[Iterable[torch.Tensor]] | None = None,
        mpu: Any = None,
        zero_reduce_scatter: bool = False,
        deepspeed: Any = None,
    ) -> None:
        self.mpu, self.zero_reduce_scatter, self.deepspeed = mpu, zero_reduce_scatter, deepspeed
        self.params = [param for group in param_groups or () for param in group]
        self.has_moe_params = any(map(is_expert_parameter, self.params))

    @staticmethod
    def _has_inf_or_nan(x: torch.Tensor, i: int | None = None) -> bool:
        return not bool(torch.isfinite(x).all())

    def has_overflow_serial(self, params: Iterable[torch.Tensor]) -> bool:
        """Whether a gradient on this rank is not finite."""
        return any(param.grad is not None and self._has_inf_or_nan(param.grad) for param in params)

    def has_overflow(self, params: Iterable[torch.Tensor], has_moe_params: bool | None = None) -> bool:
        """Whether a gradient is not finite on this rank, or on those that must skip the step with it.

        Args:
            has_moe_params: whether ranks with other experts are among those; None: as the constructor has found.
        """
        found = self.has_overflow_serial(params)
        experts = self.has_moe_params if has_moe_params is None else has_moe_params
        return self._agree(found, experts, everywhere=self._divided())

    def _divided(self) -> bool:
        reduces = getattr(self.deepspeed, "enable_backward_allreduce", True)
        return self.zero_reduce_scatter or not reduces

    def _agree(self, found: bool, experts: bool, everywhere: bool) -> bool:
        value = float(found)
        if experts:
            value = _spread(value, comm.ReduceOp.MAX, _expert_group())
        if everywhere:
            value = _spread(value, comm.ReduceOp.MAX, None)
        elif self.mpu is not None:
            value = _spread(value, comm.ReduceOp.MAX, self.mpu.get_model_parallel_group())
        return bool(value)

    def check(self, param_groups: Iterable[Iterable[torch.Tensor]] | None = None) -> bool:
        """`has_overflow` for the constructor's parameters, or for these."""
        if param_groups is None:
            return self.has_overflow(self.params)
        params = [param for group in param_groups for param in group]
        return self.has_overflow(params, any(map(is_expert_parameter, params)))

    def check_using_norm(self, norm_group: Sequence[float], reduce_overflow: bool = True) -> bool:
        """Whether one of the norms is -1, which `get_weight_norm` and `get_grad_norm` answer for what is not finite.

        Args:
            reduce_overflow: without an mpu, let all ranks answer alike.
        """
        found = any(float(norm) == -1 for norm in norm_group)
        return self._agree(found, self.has_moe_params, everywhere=self.mpu is None and reduce_overflow)


def _norm_of(tensors: list[tuple[Any, torch.Tensor]], norm_type: float, mpu: Any) -> float:
    """Norm of tensors; -1: not finite. The parameter beside each says whether model-parallel ranks share it."""
    first = mpu is None or mpu.get_model_parallel_rank() == 0
    own = [value for param, value in tensors if first or is_model_parallel_parameter(param)]
    norms = [float(torch.linalg.vector_norm(value.detach().double(), norm_type)) for value in own]
    if math.isinf(norm_type):
        total = math.nan if any(map(math.isnan, norms)) else max(norms, default=0.0)
    else:
        total = sum(norm**norm_type for norm in norms)
    if mpu is not None:
        op = comm.ReduceOp.MAX if math.isinf(norm_type) else comm.ReduceOp.SUM
        total = _spread(total, op, mpu.get_model_parallel_group())
    if not math.isinf(norm_type):
        total = total ** (1.0 / norm_type)
    return total if math.isfinite(total) else -1


def get_weight_norm(parameters: Any, norm_type: float = 2, mpu: Any = None) -> float:
    """Norm of tensors together; -1 if they are not finite.

    Args:
        mpu: with one, the norm of the whole model: each tensor that its ranks have in common counts once.
    """
    tensors = [parameters] if torch.is_tensor(parameters) else list(parameters)
    return _norm_of([(tensor, tensor) for tensor in tensors], float(norm_type), mpu)


def get_grad_norm(parameters: Any, norm_type: float = 2, mpu: Any = None) -> float:
    """The same for the gradients of parameters; those without one do not count."""
    params = [parameters] if torch.is_tensor(parameters) else list(parameters)
    return _norm_of(
        [(param, param.grad) for param in params if param.grad is not None], float(norm_type), mpu
    )


def count_used_parameters_in_backward(parameters: Iterable[torch.nn.Parameter]) -> int:
    """How many of the parameters get a gradient in the backward pass that runs now.

    Raises:
        RuntimeError: no backward pass runs.
    """
    with (
        torch.enable_grad()
    ):  # a parameter's node is found through a view of it, which has none under no_grad
        nodes = [
            torch.autograd.graph._get_grad_fn_or_grad_acc(param)
            for param in parameters
            if param.requires_grad
        ]
    return sum(bool(torch._C._will_engine_execute_node(node)) for node in nodes)
