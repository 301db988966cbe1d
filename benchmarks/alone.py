"""Memory, and time to the first step, of each peer alone in fresh processes.

    python benchmarks/alone.py --ranks 2 --size 20m --dtype bf16 [--deepspeed] [--rounds 3]

Every peer is started with torchrun once in each round, one after the other, so that drift of a shared
machine hits all alike. Printed are medians over the rounds of the largest value over the ranks:

- first step: seconds from starting torchrun to the end of the first step on the last rank;
- peak: bytes of resident memory, at most, above what was resident before the model was built;
- in step, between: bytes per parameter of all live tensors, counted exactly, after the last backward pass
  and after the update. What is alive then is parameters, gradients, masters, optimizer states, and the
  engine's own buffers; activations are gone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MARK = "MEASURED "


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", default="20m", help="see gpt.py")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--peers", nargs="+", help='only these, for example --peers DDP "xtrain 2"')
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a rank: the peer that it runs
    return parser.parse_args()


# ---------------------------------------------------------------- inside a rank


def _kernel_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{key}:"))) * 1024


def _live_bytes() -> int:
    """Bytes of the storages behind all tensors of the process, each counted once."""
    import torch

    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    tensors += [item.grad for item in tensors if item.is_leaf and item.grad is not None]
    storages = {}
    for tensor in tensors:
        plain = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = plain.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def run_rank(args: argparse.Namespace) -> None:
    """Train the one peer and print what was measured, from rank 0."""
    import peers
    import torch
    import torch.distributed as dist
    from gpt import GPT, SIZES

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, tensors_before = _kernel_bytes("VmRSS"), _live_bytes()
    model = GPT(args.size, args.length)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    peer = peers.build(args.child, model, args.dtype, args.batch)
    ids = torch.randint(0, SIZES[args.size][3], (args.batch, args.length))
    measured: dict[str, Any] = {}
    for step in range(args.steps):
        peer.backward(ids)
        if step == args.steps - 1:
            measured["in step"] = (_live_bytes() - tensors_before - ids.nbytes) / parameters
        peer.update()
        if step == 0:
            measured["first step"] = time.time()
    measured["between"] = (_live_bytes() - tensors_before - ids.nbytes) / parameters
    measured["peak"] = _kernel_bytes("VmHWM") - before
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, measured)
    if dist.get_rank() == 0:
        largest = {key: max(of_rank[key] for of_rank in of_ranks) for key in measured}
        print(MARK + json.dumps(largest), flush=True)
    dist.destroy_process_group()


# ---------------------------------------------------------------- outside


def launch(name: str, args: argparse.Namespace) -> dict[str, float] | str:
    """What the ranks of a fresh torchrun measured, or the last line of what they said."""
    options = ["--size", args.size, "--dtype", args.dtype, "--steps", str(args.steps)]
    options += ["--batch", str(args.batch), "--length", str(args.length), "--child", name]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(args.ranks), __file__, *options]
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            measured = json.loads(line.removeprefix(MARK))
            measured["first step"] -= start
            return measured
    errors = [line for line in done.stderr.splitlines() if re.search(r"\w*Error: |error: ", line)]
    return errors[0] if errors else f"exit status {done.returncode}"


def main() -> None:
    args = arguments()
    if args.child:
        run_rank(args)
        return
    import peers

    names = args.peers or peers.names(args.ranks, args.stages, args.deepspeed)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in list(results):
            measured = launch(name, args)
            if isinstance(measured, str):
                print(f"{name} is left out: {measured}")
                del results[name]
            else:
                results[name].append(measured)
    print(
        f"GPT {args.size}, {args.dtype}, ranks: {args.ranks}, batch {args.batch} x {args.length}, {args.steps} steps"
    )
    columns = {"first step s": 14, "smallest": 10, "largest": 9, "peak MB": 9, "in step": 10, "between": 10}
    print(f"{'peer':<14}" + "".join(f"{title:>{width}}" for title, width in columns.items()))
    for name, rounds in results.items():
        seconds = [measured["first step"] for measured in rounds]
        peak, inside, between = (
            statistics.median(measured[key] for measured in rounds) for key in ("peak", "in step", "between")
        )
        print(
            f"{name:<14}{statistics.median(seconds):>14.2f}{min(seconds):>10.2f}{max(seconds):>9.2f}"
            f"{peak / 1e6:>9.0f}{inside:>10.2f}{between:>10.2f}"
        )


if __name__ == "__main__":
    main()
