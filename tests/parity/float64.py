"""The same 50 steps in float64 with nothing but PyTorch: no engine, one process."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.parity.cases import BETAS, CLIP, EPS, STEPS, closed_form_rate, flags, load_script


def float64_curve(corpus: Path) -> list[float]:
    """Loss of each step over the global batch, as the mean of its two micro-batches."""
    script = load_script("xtrain")
    args = script.parse_args(flags(corpus))
    sampler = script.build_sampler(args)
    model = script.build_model(args).double()
    optimizer = torch.optim.AdamW(script.build_param_groups(model, args.weight_decay), betas=BETAS, eps=EPS)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = closed_form_rate(step)
        optimizer.zero_grad()
        total = 0.0
        for slot in range(2):
            batch = {name: torch.from_numpy(array) for name, array in sampler.batch(step, slot, 8).items()}
            loss = model(**batch) / 2
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(total)
    return losses
