"""The training of toys.ParallelMLP, by xtrain over a process grid or by PyTorch alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.toys import ParallelMLP
from tests.training import GLOBAL_BATCH, samples

LR, CLIP = 0.01, 0.3


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
    model = ParallelMLP().to(dtype)
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
