"""Time of a training step: xtrain, DDP, FSDP2 and (with --deepspeed) DeepSpeed, interleaved in one run.

    torchrun --nproc-per-node 2 benchmarks/step_time.py --size 20m --dtype bf16 [--deepspeed]

All peers live in the same processes and take turns, a few steps each, so that drift of a shared machine
hits all alike. Printed are ratios of medians to DDP with the spread of the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from gpt import GPT, SIZES
from torch.nn.parallel import DistributedDataParallel

LR, BETAS, CLIP = 1e-3, (0.9, 0.95), 1.0
Step = Callable[[torch.Tensor], None]


def _autocast(dtype: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")


def ddp(model: torch.nn.Module, dtype: str, micro: int) -> Step:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=LR, betas=BETAS)

    def step(ids: torch.Tensor) -> None:
        with _autocast(dtype):
            loss = wrapped(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def fsdp2(model: torch.nn.Module, dtype: str, micro: int) -> Step:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mixed = (
        MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16) if dtype == "bf16" else MixedPrecisionPolicy()
    )
    for block in model.blocks:
        fully_shard(block, mp_policy=mixed)
    fully_shard(model, mp_policy=mixed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS)

    def step(ids: torch.Tensor) -> None:
        model(ids).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def engine(package: Any, stage: int, model: torch.nn.Module, dtype: str, micro: int, **params: Any) -> Step:
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

    def step(ids: torch.Tensor) -> None:
        built.backward(built(ids))
        built.step()

    return step


def peers(args: argparse.Namespace) -> dict[str, Callable[[torch.nn.Module, str, int], Step]]:
    import xtrain

    found: dict[str, Any] = {"DDP": ddp, "FSDP2": fsdp2}
    for stage in args.stages:
        found[f"xtrain {stage}"] = lambda *a, s=stage: engine(xtrain, s, *a)
    if args.deepspeed:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__.update(dict.fromkeys(deepspeed.ops.__compatible_ops__, False))
        for stage in args.stages:
            found[f"DeepSpeed {stage}"] = lambda *a, s=stage: engine(deepspeed, s, *a, torch_adam=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="20m")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of each peer in a round")
    parser.add_argument("--deepspeed", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    steps: dict[str, Step] = {}
    for name, build in peers(args).items():
        torch.manual_seed(0)
        steps[name] = build(GPT(args.size, args.length), args.dtype, args.batch)
    ids = torch.randint(0, SIZES[args.size][3], (args.batch, args.length))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(args.rounds + 1):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(args.steps):
                step(ids)
            dist.barrier()
            if round_:  # the first warms up
                seconds[name].append((time.perf_counter() - start) / args.steps)
    if dist.get_rank() == 0:
        base = statistics.median(seconds["DDP"])
        print(
            f"GPT {args.size}, {args.dtype}, {dist.get_world_size()} ranks, batch {args.batch} x {args.length}"
        )
        print(f"{'peer':<14}{'median s':>10}{'/ DDP':>8}{'smallest':>10}{'largest':>10}")
        for name, values in seconds.items():
            ratios = [a / b for a, b in zip(values, seconds["DDP"], strict=True)]
            print(
                f"{name:<14}{statistics.median(values):>10.3f}{statistics.median(values) / base:>8.2f}"
                f"{min(ratios):>10.2f}{max(ratios):>10.2f}"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
