"""A small regression problem, trained by xtrain or by a plain PyTorch loop, step for step the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import xtrain
from tests.toys import FEATURES, OUTPUTS, TwoLayers

GLOBAL_BATCH = 16


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return TwoLayers()


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Decay for matrices only, so that there are two groups."""
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]


def samples(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step, float64."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(GLOBAL_BATCH, FEATURES, generator=generator, dtype=torch.float64)
    return x, x[:, :OUTPUTS].sin() * 2


def loss_of(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    out = model(x.to(dtype))
    wide = torch.promote_types(dtype, torch.float32)
    return (out.to(wide) - y.to(wide)).square().mean()


def zero(stage: int, persistent: int = 10, **more: Any) -> dict[str, Any]:
    """Small buckets; in stage 3 all but parameters of up to `persistent` elements are divided."""
    small = {"stage3_param_persistence_threshold": persistent} if stage == 3 else {}
    return {"stage": stage, "reduce_bucket_size": 150, **small, **more}


def config(stage: int = 0, micro: int = 4, bf16: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": 0.5,
        "zero_optimization": zero(stage),
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 4, "total_num_steps": 40},
        },
        **more,
    }


def engine_step(engine: Any, step: int) -> float:
    """One optimizer step on this rank's share; the loss averaged over everything."""
    x, y = samples(step)
    micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    total = torch.zeros((), dtype=torch.float64)
    for index in range(accumulation):
        first = (engine.grid.rank * accumulation + index) * micro
        loss = loss_of(engine, x[first : first + micro], y[first : first + micro])
        engine.backward(loss)
        engine.step()
        total += loss.detach().double() / accumulation
    xtrain.comm.all_reduce(total)
    return total.item() / engine.world_size


def train(ds_config: dict[str, Any], steps: int = 12, model: nn.Module | None = None) -> dict[str, Any]:
    """Train with xtrain on this rank; returns curve, norms, rates and final weights (float64)."""
    model = model or build_model()
    engine, _, _, _ = xtrain.initialize(model=model, model_parameters=param_groups(model), config=ds_config)
    losses, norms, rates = [], [], []
    for step in range(steps):
        rates.append(engine.get_lr()[0])
        losses.append(engine_step(engine, step))
        norms.append(engine.get_global_grad_norm())
    whole = engine.module_state_dict()
    weights = {name: whole[name].detach().double().clone() for name, _ in engine.module.named_parameters()}
    return {"losses": losses, "norms": norms, "rates": rates, "weights": weights}


def reference(rates: list[float], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The same training by PyTorch alone, in one process, with the given learning rate at each step."""
    model = build_model().to(dtype)
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, y = samples(step)
        loss = loss_of(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "weights": dict(model.named_parameters())}
