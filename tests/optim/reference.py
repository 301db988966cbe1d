"""Lamb and Muon written down once more, in float64 on whole parameters, from their papers and DeepSpeed's formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests import training

Step = Callable[[str, torch.Tensor, dict[str, Any], int, float], None]
"""(name, parameter with .grad, its state, step from 1, learning rate)."""


def lamb(decay: float = 0.0, eps: float = 1e-6, low: float = 0.01, high: float = 10.0) -> Step:
    """DeepSpeed's fused kernel: bias correction in the step size, decay inside the trust ratio."""

    def step(name: str, p: torch.Tensor, state: dict[str, Any], t: int, lr: float) -> None:
        b1, b2 = 0.9, 0.95
        g = p.grad
        m = state["m"] = b1 * state.get("m", torch.zeros_like(p)) + (1 - b1) * g
        v = state["v"] = b2 * state.get("v", torch.zeros_like(p)) + (1 - b2) * g * g
        u = m / (v.sqrt() + eps) + decay * p
        ratio = 1.0
        if p.norm() > 0 and u.norm() > 0:
            ratio = min(max(float(p.norm() / u.norm()), low), high)
        p -= lr * math.sqrt(1 - b2**t) / (1 - b1**t) * ratio * u

    return step


def newton_schulz(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Through the singular values: the quintic applied to each of them."""
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    s = s / (g.norm() + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def blend(p: torch.Tensor, state: dict[str, Any], beta: float = 0.9) -> torch.Tensor:
    """Nesterov's look ahead at the averaged momentum."""
    m = state["m"] = beta * state.get("m", torch.zeros_like(p)) + (1 - beta) * p.grad
    return (1 - beta) * p.grad + beta * m


def train(
    step: Step,
    rates: list[float],
    rewrite: Callable[[torch.Tensor, dict[str, Any]], torch.Tensor] | None = None,
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """training.train in one process and float64; `rewrite` replaces gradients of matrices before clipping."""
    model = (model or training.build_model()).double()
    states: dict[str, dict[str, Any]] = {name: {} for name, _ in model.named_parameters()}
    losses, norms = [], []
    for t, rate in enumerate(rates, 1):
        loss = training.loss_of(model, *training.samples(t - 1))
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name, p in model.named_parameters():
                if rewrite is not None and p.ndim > 1:
                    p.grad.copy_(rewrite(p, states[name]))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        with torch.no_grad():
            for name, p in model.named_parameters():
                step(name, p, states[name], t, rate)
    return {"losses": losses, "norms": norms, "weights": dict(model.named_parameters())}
