"""Pretrain a GLM with the DeepSpeed API.

Run it with `xtrain launch`, with torchrun, or alone:

    xtrain launch model=glm_tiny
    torchrun --nproc-per-node 2 examples/pretrain_glm.py --steps 50
    python examples/pretrain_glm.py --steps 50

With `import deepspeed` in place of the first import it runs on the real DeepSpeed; so it does, unchanged, with
`"xtrain": {"engine": "deepspeed"}` in its config.
"""

import argparse
import os
import sys

import torch

import xtrain as deepspeed
from xtrain.base.errors import XtrainError
from xtrain.data.corpus import find_files
from xtrain.data.infilling import InfillingSampler
from xtrain.data.tokens import prepare
from xtrain.models.glm import GLM, GLMConfig


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Pretrain a GLM with the DeepSpeed API")
    model = parser.add_argument_group("model")
    model.add_argument("--num-layers", type=int, default=4)
    model.add_argument("--hidden-size", type=int, default=128)
    model.add_argument("--num-heads", type=int, default=4)
    model.add_argument("--ffn-size", type=int, default=352)
    model.add_argument("--vocab-size", type=int, default=2048)
    model.add_argument("--rotary", choices=["1d", "2d"], default="2d")
    model.add_argument("--dropout", type=float, default=0.0)
    model.add_argument("--embedding-gradient-alpha", type=float, default=1.0)
    model.add_argument(
        "--aligned-init", action="store_true", help="the same initial weights on every device (xtrain only)"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data-path", nargs="+", help="text files, folders or globs; default: Python's library"
    )
    data.add_argument("--seq-length", type=int, default=128)
    train = parser.add_argument_group("training")
    train.add_argument("--steps", type=int, default=300)
    train.add_argument("--seed", type=int, default=1234)
    train.add_argument("--weight-decay", type=float, default=0.01)
    train.add_argument("--log-interval", type=int, default=10)
    train.add_argument("--save", help="folder for checkpoints")
    train.add_argument(
        "--save-interval", type=int, default=0, help="steps between checkpoints; 0: only at the end"
    )
    train.add_argument(
        "--continue", dest="go_on", action="store_true", help="continue from what --save holds, if anything"
    )
    train.add_argument("--load", help="folder of the checkpoint to continue from")
    train.add_argument("--load-tag", help="the checkpoint in it; default: the latest")
    train.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.add_config_arguments(parser)
    return parser.parse_args(argv)


def default_config(args):
    """The DeepSpeed config when no --deepspeed_config is given."""
    return {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_max_lr": 2e-3,
                "warmup_num_steps": max(2, args.steps // 20),
                "warmup_type": "linear",
                "total_num_steps": args.steps,
            },
        },
    }


class DataParallelUnit:
    """The script's model-parallel unit: every rank is data parallel, as Megatron's mpu would say it."""

    def __init__(self):
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.data_group = torch.distributed.new_group(list(range(self.world_size)))
        singles = [torch.distributed.new_group([rank]) for rank in range(self.world_size)]
        self.model_group = singles[self.rank]

    def get_data_parallel_rank(self):
        return self.rank

    def get_data_parallel_world_size(self):
        return self.world_size

    def get_data_parallel_group(self):
        return self.data_group

    def get_model_parallel_rank(self):
        return 0

    def get_model_parallel_world_size(self):
        return 1

    def get_model_parallel_group(self):
        return self.model_group


def build_sampler(args):
    """Tokenize the corpus once per host, while the other ranks wait."""
    files = find_files(args.data_path)
    if args.local_rank == 0:
        prepare(files, args.vocab_size)
    deepspeed.comm.barrier()
    return InfillingSampler(prepare(files, args.vocab_size), args.seq_length, args.seed)


def build_model(args):
    config = GLMConfig(
        vocab_size=args.vocab_size,
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_heads=args.num_heads,
        ffn_size=args.ffn_size,
        rotary=args.rotary,
        dropout=args.dropout,
        embedding_gradient_alpha=args.embedding_gradient_alpha,
    )
    if args.aligned_init:
        with deepspeed.aligned_init(args.seed):
            return GLM(config)
    torch.manual_seed(args.seed)
    return GLM(config)


def build_param_groups(model, weight_decay):
    """Weight decay for matrices; none for biases and normalisation."""
    matrices = [param for param in model.parameters() if param.ndim >= 2]
    vectors = [param for param in model.parameters() if param.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def train_step(engine, sampler, mpu, step):
    """One optimizer step; returns the loss averaged over micro-batches and ranks."""
    accumulation = engine.gradient_accumulation_steps()
    losses = []
    for index in range(accumulation):
        slot = mpu.get_data_parallel_rank() * accumulation + index
        arrays = sampler.batch(step, slot, engine.train_micro_batch_size_per_gpu())
        batch = {name: torch.from_numpy(array).to(engine.device) for name, array in arrays.items()}
        loss = engine(**batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    # Added on the host in float64: not every device does that.
    mine = torch.stack(losses).cpu().double().mean().item()
    everyone = [0.0] * mpu.get_data_parallel_world_size()
    deepspeed.comm.all_gather_object(everyone, mine, group=mpu.get_data_parallel_group())
    return sum(everyone) / len(everyone)


def main(argv=None):
    args = parse_args(argv)
    deepspeed.init_distributed()
    mpu = DataParallelUnit()
    sampler = build_sampler(args)
    model = build_model(args)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=build_param_groups(model, args.weight_decay),
        args=args,
        mpu=mpu,
        dist_init_required=False,
        config_params=None if args.deepspeed_config else default_config(args),
    )
    if args.go_on:
        engine.load_checkpoint(args.save)
    elif args.load:
        path, _ = engine.load_checkpoint(args.load, tag=args.load_tag)
        if path is None:
            raise XtrainError(f"--load {args.load}: there is no checkpoint in this folder")
    engine.train()
    losses = []
    while engine.global_steps < args.steps:
        losses.append(train_step(engine, sampler, mpu, engine.global_steps))
        step = engine.global_steps
        if engine.global_rank == 0 and (step % args.log_interval == 0 or step == args.steps):
            print(
                f"step {step}/{args.steps} | loss {losses[-1]:.6f} | lr {engine.get_lr()[0]:.3e}", flush=True
            )
        last = step == args.steps
        if args.save and (last or (args.save_interval and step % args.save_interval == 0)):
            engine.save_checkpoint(args.save)
    return losses


if __name__ == "__main__":
    try:
        main()
    except XtrainError as error:
        print(f"{sys.argv[0]}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    torch.distributed.destroy_process_group()
