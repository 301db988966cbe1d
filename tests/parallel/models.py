"""Megatron-style layers over a group, and the same network whole: for tests of process grids."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.training import FEATURES, GLOBAL_BATCH, OUTPUTS, samples

HIDDEN, LR, CLIP = 12, 0.01, 0.3


class _Copy(torch.autograd.Function):
    """The same input on every rank; its gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum of every rank's part; each gets its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


def whole_weights() -> dict[str, torch.Tensor]:
    """float64; the gradient of the replicated ones is not small."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.4

    return {
        "scale": normal(FEATURES) + 1,
        "column": normal(HIDDEN, FEATURES),
        "column_bias": normal(HIDDEN),
        "row": normal(OUTPUTS, HIDDEN),
        "row_bias": normal(OUTPUTS),
    }


DIVIDED = {"column": 0, "column_bias": 0, "row": 1}
"""Dimension in which a weight is divided over tensor-parallel ranks; the others are replicated."""


def shard(name: str, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    return whole.chunk(size, DIVIDED[name])[rank] if name in DIVIDED else whole


class MLP(nn.Module):
    """Column-parallel, then row-parallel; whole with `group` None. `mark`: Megatron's attribute on divided weights."""

    def __init__(self, group: Any = None, mark: str = "tensor_model_parallel") -> None:
        super().__init__()
        self.group = group
        size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        for name, whole in whole_weights().items():
            param = nn.Parameter(shard(name, whole, size, rank).clone().float())
            setattr(param, mark, name in DIVIDED)
            setattr(self, name, param)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        if self.group is not None:
            x = _Copy.apply(x, self.group)
        hidden = torch.tanh(nn.functional.linear(x, self.column, self.column_bias))
        out = nn.functional.linear(hidden, self.row)
        if self.group is not None:
            out = _Sum.apply(out, self.group)
        return out + self.row_bias


def config(stage: int, dtype: str, **more: Any) -> dict[str, Any]:
    small = {"stage3_param_persistence_threshold": 6} if stage == 3 else {}
    return {
        "train_batch_size": GLOBAL_BATCH,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 60, **small},
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16", "initial_scale_power": 8, "hysteresis": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.1, "torch_adam": True}},
        **more,
    }


def reference(steps: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The same training in one process by PyTorch alone."""
    model = MLP().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)
    losses, norms = [], []
    for step in range(steps):
        x, y = samples(step)
        loss = (model(x.to(dtype)) - y.to(dtype)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        losses.append(loss.item())
    weights = {name: param.detach() for name, param in model.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights}


def train(engine: Any, replica: int, steps: range) -> tuple[list[float], list[float]]:
    """(losses of this rank's samples, gradient norms) of each step."""
    losses, norms = [], []
    dtype = next(engine.module.parameters()).dtype
    micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    for step in steps:
        x, y = samples(step)
        total = 0.0
        for index in range(accumulation):
            first = (replica * accumulation + index) * micro
            out = engine(x[first : first + micro].to(dtype)).float()
            loss = (out - y[first : first + micro].float()).square().mean()
            engine.backward(loss)
            engine.step()
            total += loss.item() / accumulation
        losses.append(total)
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms
