"""The training engines that the benchmarks compare, behind two functions each. No measuring here.

Packages are imported when a peer is built, so that a process pays only for the one it runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LR, BETAS, CLIP = 1e-3, (0.9, 0.95), 1.0


@dataclass(frozen=True)
class Peer:
    """One model in training: `backward(ids)` until the gradients are there, then `update()`."""

    backward: Callable[[torch.Tensor], None]
    update: Callable[[], None]

    def step(self, ids: torch.Tensor) -> None:
        self.backward(ids)
        self.update()


def names(ranks: int, stages: list[int], deepspeed: bool) -> list[str]:
    """All peers; `bare` is PyTorch without any engine, which only one rank can run."""
    engines = ["xtrain", *(["DeepSpeed"] if deepspeed else [])]
    plain = ["DDP", "FSDP2"] if ranks > 1 else ["bare", "DDP", "FSDP2"]
    return plain + [f"{engine} {stage}" for engine in engines for stage in stages]


def build(name: str, model: nn.Module, dtype: str, micro: int) -> Peer:
    """The peer called `name`; AdamW with clipping, bf16 parameters or autocast for `dtype="bf16"`.

    Raises:
        NotImplementedError: the engine does not have this yet.
    """
    if name in ("bare", "DDP"):
        return _plain(model, dtype, wrap=name == "DDP")
    if name == "FSDP2":
        return _fsdp2(model, dtype)
    package, _, stage = name.partition(" ")
    if package == "DeepSpeed":
        return _engine(_deepspeed(), int(stage), model, dtype, micro, torch_adam=True)
    import xtrain

    return _engine(xtrain, int(stage), model, dtype, micro)


def _plain(model: nn.Module, dtype: str, wrap: bool) -> Peer:
    if wrap:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS)

    def backward(ids: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(ids)
        loss.backward()

    return Peer(backward, lambda: _clip_and_step(model, optimizer))


def _clip_and_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()


def _fsdp2(model: nn.Module, dtype: str) -> Peer:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    narrow = torch.bfloat16 if dtype == "bf16" else None
    mixed = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=narrow)
    for block in model.blocks:
        fully_shard(block, mp_policy=mixed)
    fully_shard(model, mp_policy=mixed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS)
    return Peer(lambda ids: model(ids).backward(), lambda: _clip_and_step(model, optimizer))


def _deepspeed() -> Any:
    """DeepSpeed on the host, with nothing compiled."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__.update(dict.fromkeys(deepspeed.ops.__compatible_ops__, False))
    return deepspeed


def _engine(package: Any, stage: int, model: nn.Module, dtype: str, micro: int, **params: Any) -> Peer:
    built, _, _, _ = package.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": micro,
            "gradient_clipping": CLIP,
            "bf16": {"enabled": dtype == "bf16"},
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": LR, "betas": list(BETAS), **params}},
        },
    )
    return Peer(lambda ids: built.backward(built(ids)), lambda: built.step())
