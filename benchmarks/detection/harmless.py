"""The references, and differences that must not be flagged: they round otherwise, or not even that."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.detection.case import Case, Change, nothing, with_dropout
from benchmarks.detection.training import Training
from xtrain.align.recorder import Recorder
from xtrain.comm import init_distributed

REFERENCES = (Case("fp32", nothing), Case("dropout", with_dropout, reference="dropout"))


def zero(stage: int, **more: Any) -> Change:
    """Another ZeRO stage."""
    return lambda t: t.config["zero_optimization"].update({"stage": stage, **more})


def section(**keys: Any) -> Change:
    """Keys of the config's section xtrain."""
    return lambda t: t.section(**keys)


def top(**keys: Any) -> Change:
    """Keys of the config."""
    return lambda t: t.config.update(keys)


def fake(profile: str, **numerics: Any) -> Change:
    """Another chip's arithmetic."""
    return section(backend="fake", fake={"profile": profile, **({"numerics": numerics} if numerics else {})})


def dropout_on(change: Change) -> Change:
    """The same for the reference with dropout."""

    def both(t: Training) -> None:
        with_dropout(t)
        change(t)

    return both


def resumed(t: Training) -> None:
    """Interrupted in the middle, and resumed."""
    t.restart = True


def over_shared_memory(t: Training) -> None:
    """xtrain's collectives over shared memory instead of gloo."""
    dist.destroy_process_group()
    init_distributed(
        "shm",
        verbose=False,
        init_method=f"file://{t.folder}/store",
        rank=t.rank,
        world_size=t.ranks,
        timeout=timedelta(minutes=2),
    )


def two_threads(t: Training) -> None:
    """Matrix products are divided otherwise."""
    torch.set_num_threads(2)
    t.undo.callback(torch.set_num_threads, 1)


def checkpointing(t: Training) -> None:
    """Layers are computed again in backward."""

    def change(model: Any) -> None:
        for layer in model.layers:
            layer.forward = lambda *args, run=layer.forward: checkpoint(run, *args, use_reentrant=False)

    t.model_made.append(change)


def fused_attention(t: Training) -> None:
    """PyTorch's kernel in place of the explicit formula."""

    def change(model: Any) -> None:
        for layer in model.layers:
            layer.attention.forward = _attention(layer.attention)

    t.model_made.append(change)


def _attention(own: Any) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        qkv = own.query_key_value(x).view(batch, length, 3, own.heads, hidden // own.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = own._turn(query, positions), own._turn(key, positions)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        found: torch.Tensor = own.dense(context.transpose(1, 2).reshape(batch, length, hidden))
        return found

    return forward


def other_ulps(t: Training) -> None:
    """Weights differ in the last bit, by a seed that the envelope has not seen."""
    from xtrain.reproducible.perturbation import perturb

    t.model_made.append(lambda model: perturb(model, 4711))


def torch_adam(t: Training) -> None:
    """PyTorch's AdamW, passed to initialize()."""
    import xtrain

    def make(model: nn.Module) -> Any:
        options = t.config.pop("optimizer")["params"]
        built = torch.optim.AdamW(t.param_groups(model), **options)
        config = {**t.config, "train_micro_batch_size_per_gpu": t.micro}
        return xtrain.initialize(model=model, optimizer=built, config=config)[0]

    t.make = make


def deepspeed_engine(t: Training) -> None:
    """The real DeepSpeed trains."""
    from tests.live_deepspeed import fresh_deepspeed

    t.undo.enter_context(fresh_deepspeed())
    t.config["optimizer"]["params"]["torch_adam"] = True  # it would compile its own
    t.section(engine="deepspeed")


class _PlainLoop:
    """PyTorch's DDP, AdamW and clipping, without xtrain, recorded by hand: looks like an engine to `Training`."""

    def __init__(self, t: Training, model: nn.Module) -> None:
        self.training = t
        self.module = model
        self._wrapped = nn.parallel.DistributedDataParallel(model)
        options = t.config["optimizer"]["params"]
        self._optimizer = torch.optim.AdamW(t.param_groups(model), **options)
        self._recorder = Recorder(t.folder / "metrics.jsonl")
        self._losses: list[torch.Tensor] = []
        self._step = 0
        self._set_rate()

    def _set_rate(self) -> None:
        """That of DeepSpeed's WarmupDecayLR: its iterations count from -1, with rate 0 in the first two."""
        params = self.training.config["scheduler"]["params"]
        warmup, total, top_rate = (
            params["warmup_num_steps"],
            params["total_num_steps"],
            params["warmup_max_lr"],
        )
        done = max(0, self._step - 1)
        share = done / warmup if done < warmup else (total - done) / (total - warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = top_rate * share

    def train(self) -> None:
        self._wrapped.train()

    def __call__(self, **batch: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._wrapped(**batch)
        return found

    def backward(self, loss: torch.Tensor) -> None:
        self._losses.append(loss.detach())
        (loss / self.training.accumulation).backward()

    def step(self) -> None:
        if len(self._losses) < self.training.accumulation:
            return  # DDP has averaged the first micro-batch's gradients already, which the second's are added to
        norm = self._clip()
        rate = self._optimizer.param_groups[0]["lr"]
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._recorder.step(loss=torch.stack(self._losses).double().mean(), grad_norm=norm, lr=rate)
        self._losses = []
        self._step += 1
        self._set_rate()

    def _clip(self) -> torch.Tensor:
        """By a norm in float64: PyTorch's own is off by 1e-4 on the host, for embeddings that are mostly zero."""
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt()
        for grad in grads:
            grad.mul_(min(1.0, self.training.config["gradient_clipping"] / (float(norm) + 1e-6)))
        return norm

    def destroy(self) -> None:
        self._recorder.close()


def plain_loop(t: Training) -> None:
    """No xtrain at all but the recorder."""
    t.make = lambda model: _PlainLoop(t, model)


TF32 = "TF32"
HARMLESS = (
    Case("ZeRO stage 0", zero(0)),
    Case("ZeRO stage 2", zero(2)),
    Case("ZeRO stage 3, everything divided", zero(3, stage3_param_persistence_threshold=0)),
    Case("1 rank, 4 micro-batches", nothing, ranks=1),
    Case("4 ranks, 1 micro-batch", nothing, ranks=4),
    Case("small buckets", zero(1, reduce_bucket_size=20_000, allgather_bucket_size=20_000)),
    Case("no overlap of communication", zero(1, overlap_comm=False)),
    Case("gradients divided before they are added", top(prescale_gradients=True)),
    Case("shared memory instead of gloo", over_shared_memory),
    Case("MPI instead of gloo", nothing, needs="mpi4py"),
    Case("aligned mode", section(aligned=True)),
    Case("optimizer states offloaded to the host", zero(1, offload_optimizer={"device": "cpu"})),
    Case("activation checkpointing", checkpointing),
    Case("two threads, 1 rank", two_threads, ranks=1),
    Case("PyTorch's fused attention", fused_attention),
    Case("PyTorch's AdamW", torch_adam),
    Case("PyTorch's DDP and AdamW, without xtrain", plain_loop),
    Case("DeepSpeed's engine", deepspeed_engine, needs="deepspeed"),
    Case("interrupted and resumed", resumed),
    Case("weights that differ in the last bit", other_ulps),
    Case("arithmetic of the Sunway profile (fp32)", fake("sw26010pro")),
    Case("arithmetic of the DCU profile (fp32)", fake("dcu-nobf16")),
    Case("arithmetic of the A100 profile with TF32", fake("a100-tf32"), band=TF32),
    Case("arithmetic of the Ascend 910B profile with HF32", fake("ascend910b-hf32"), band=TF32),
    Case("TF32 by truncation", fake("custom", products="tf32", rounding="toward-zero"), band=TF32),
    Case("dropout: ZeRO stage 3", dropout_on(zero(3)), reference="dropout"),
    Case("dropout: 4 ranks, 1 micro-batch", with_dropout, reference="dropout", ranks=4),
    Case("dropout: interrupted and resumed", dropout_on(resumed), reference="dropout"),
    Case("dropout: arithmetic of the Sunway profile", dropout_on(fake("sw26010pro")), reference="dropout"),
)
