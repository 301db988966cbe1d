"""A pretraining script in Megatron's manner, made for CUDA, apex and DeepSpeed; nothing in it knows of xtrain."""

import argparse
import json
import os
import random
import sys

import amp_C
import deepspeed
import mpu
import numpy as np
import torch
import torch.distributed as dist
from apex.multi_tensor_apply import multi_tensor_applier
from apex.optimizers import FusedAdam
from deepspeed.accelerator import get_accelerator
from model import GPT, FP16_Module


def arguments():
    parser = argparse.ArgumentParser()
    for name, kind, default in (
        ("layers", int, 2), ("hidden", int, 32), ("heads", int, 4), ("vocab", int, 128), ("seq-length", int, 16),
        ("batch", int, 4), ("steps", int, 30), ("model-parallel-size", int, 1), ("dropout", float, 0.0),
        ("lr", float, 3e-3), ("local_rank", int, 0), ("record", str, None), ("precision", str, "fp32"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--checkpoint-activations", action="store_true")
    return deepspeed.add_config_arguments(parser).parse_args()


def initialize_distributed(args):
    assert torch.cuda.is_available(), "needs CUDA"
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.matmul.allow_tf32 = False
    args.rank = int(os.environ["RANK"])
    args.local_rank = args.rank % torch.cuda.device_count()
    torch.cuda.set_device(args.local_rank)
    deepspeed.init_distributed(dist_backend="nccl")
    mpu.initialize_model_parallel(args.model_parallel_size)
    random.seed(1234)
    np.random.seed(1234)
    torch.manual_seed(1234)
    mpu.model_parallel_cuda_manual_seed(1234)
    args.checkpoint = None
    if args.checkpoint_activations:
        deepspeed.checkpointing.configure(
            mpu, deepspeed_config=args.deepspeed_config, num_checkpoints=args.layers
        )
        args.checkpoint = deepspeed.checkpointing.checkpoint
        mpu.get_cuda_rng_tracker = deepspeed.checkpointing.get_cuda_rng_tracker
        deepspeed.checkpointing.model_parallel_cuda_manual_seed(1234)


def get_batch(args, draws):
    """The first rank of a model-parallel group reads, and the others get it by broadcast."""
    size = (args.batch, args.seq_length + 1)
    if mpu.get_model_parallel_rank() == 0:
        # Words follow each other by a rule, so that there is something to learn.
        start = draws.integers(args.vocab, size=(args.batch, 1))
        tokens = torch.cuda.LongTensor((start + 3 * np.arange(size[1])) % args.vocab)
    else:
        tokens = torch.empty(size, dtype=torch.int64, device=torch.cuda.current_device())
    dist.broadcast(tokens, mpu.get_model_parallel_src_rank(), group=mpu.get_model_parallel_group())
    mask = torch.ones(args.seq_length, args.seq_length, device="cuda").triu(1).bool()
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask


def get_params_for_weight_decay(module):
    decay, others = {"params": []}, {"params": [], "weight_decay": 0.0}
    for name, parameter in module.named_parameters():
        (others if name.endswith("bias") or "norm" in name else decay)["params"].append(parameter)
    return [decay, others]


def main():
    args = arguments()
    initialize_distributed(args)
    model = GPT(args).cuda(torch.cuda.current_device())
    if args.precision != "fp32":
        model = FP16_Module(model, {"bf16": torch.bfloat16, "fp16": torch.half}[args.precision])
    groups = get_params_for_weight_decay(model)
    optimizer = FusedAdam(groups, lr=args.lr, weight_decay=0.01)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, args=args, mpu=mpu, dist_init_required=False
    )
    draws = np.random.default_rng(mpu.get_data_parallel_rank())
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    side = torch.cuda.Stream()
    losses = []
    for _ in range(args.steps):
        begin.record()
        with torch.cuda.stream(side):
            tokens, labels, mask = get_batch(args, draws)
        torch.cuda.current_stream().wait_stream(side)
        logits = engine(tokens, mask)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        engine.backward(loss)
        engine.step()
        end.record()
        torch.cuda.synchronize()
        averaged = loss.detach().clone().cuda()
        dist.all_reduce(averaged, group=mpu.get_data_parallel_group())
        losses.append((averaged / mpu.get_data_parallel_world_size()).item())
    overflow = torch.cuda.IntTensor([0])
    norm, _ = multi_tensor_applier(
        amp_C.multi_tensor_l2norm,
        overflow,
        [[parameter.detach().float() for parameter in model.parameters()]],
        False,
    )
    if args.rank == 0:
        print(
            f"{args.steps} steps, last of {begin.elapsed_time(end):.1f} ms, {losses[0]:.3f} to {losses[-1]:.3f}, norm "
            f"{norm.item():.3f}, {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB on "
            f"{torch.cuda.get_device_name()}, {get_accelerator().device_name()}, deepspeed {deepspeed.__version__}"
        )
        if args.record:
            with open(args.record, "w") as file:
                json.dump(losses, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
