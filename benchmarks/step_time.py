"""Time of a training step: xtrain, DDP, FSDP2 and (with --deepspeed) DeepSpeed, interleaved in one run.

    torchrun --nproc-per-node 2 benchmarks/step_time.py --size 20m --dtype bf16 [--deepspeed]
    torchrun --nproc-per-node 1 benchmarks/step_time.py     # the engine's overhead over a bare PyTorch step

All peers live in the same processes and take turns, a few steps each, so that drift of a shared machine
hits all alike. Printed are ratios of medians to the first peer with the spread of the rounds. A model that
does not fit as many times as there are peers wants --peers. Memory and time to the first step: alone.py.
"""

from __future__ import annotations

import argparse
import statistics
import time

import peers
import torch
import torch.distributed as dist
from gpt import GPT, SIZES


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="20m")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of each peer in a round")
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--peers", nargs="+", help='only these, for example --peers DDP "xtrain 2"')
    return parser.parse_args()


def build(args: argparse.Namespace) -> dict[str, peers.Peer]:
    """The peers that can be built; the others are named with the reason."""
    built = {}
    for name in args.peers or peers.names(dist.get_world_size(), args.stages, args.deepspeed):
        torch.manual_seed(0)
        try:
            built[name] = peers.build(name, GPT(args.size, args.length), args.dtype, args.batch)
        except NotImplementedError as error:
            if dist.get_rank() == 0:
                print(f"{name} is left out: {error}")
    return built


def measure(
    built: dict[str, peers.Peer], ids: torch.Tensor, rounds: int, steps: int
) -> dict[str, list[float]]:
    """Seconds of a step of each peer, by round; the first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for round_ in range(rounds + 1):
        for name, peer in built.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(steps):
                peer.step(ids)
            dist.barrier()
            if round_:
                seconds[name].append((time.perf_counter() - start) / steps)
    return seconds


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    built = build(args)
    ids = torch.randint(0, SIZES[args.size][3], (args.batch, args.length))
    seconds = measure(built, ids, args.rounds, args.steps)
    if dist.get_rank() == 0:
        base = next(iter(seconds))
        print(
            f"GPT {args.size}, {args.dtype}, ranks: {dist.get_world_size()}, batch {args.batch} x {args.length}"
        )
        print(f"{'peer':<14}{'median s':>10}{'/ ' + base:>8}{'smallest':>10}{'largest':>10}")
        for name, values in seconds.items():
            ratios = [a / b for a, b in zip(values, seconds[base], strict=True)]
            print(
                f"{name:<14}{statistics.median(values):>10.3f}"
                f"{statistics.median(values) / statistics.median(seconds[base]):>8.2f}"
                f"{min(ratios):>10.2f}{max(ratios):>10.2f}"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
