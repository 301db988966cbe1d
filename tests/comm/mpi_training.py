"""Checks of the MPI process group: DDP, FSDP2, pipelining and the engine train on it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from tests import training
from tests.comm.mpi_tools import Check, Kind, listed_in

CHECKS: dict[str, Check] = {}
check = listed_in(CHECKS)


def train_plain(steps: int, dtype: torch.dtype = torch.float64) -> tuple[list[float], nn.Module]:
    model = training.build_model().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        loss = training.loss_of(model, *training.samples(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def train_wrapped(wrapped: nn.Module, rank: int, n: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        x, y = (whole.chunk(n)[rank] for whole in training.samples(step))
        loss = training.loss_of(wrapped, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean, op=Kind.AVG)
        losses.append(mean.item())
    return losses


@check
def ddp(rank: int, n: int) -> None:
    for view, hook in ((False, False), (True, True)):
        model = nn.parallel.DistributedDataParallel(
            training.build_model().double(), gradient_as_bucket_view=view, bucket_cap_mb=0.001
        )
        if hook:
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            model.register_comm_hook(None, default_hooks.allreduce_hook)
        found = train_wrapped(model, rank, n, 6)
        expected, plain = train_plain(6)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        for mine, theirs in zip(model.module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@check
def fsdp2(rank: int, n: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = training.build_model().double()
    mesh = dist.init_device_mesh("cpu", (n,))
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = train_wrapped(model, rank, n, 6)
    expected, plain = train_plain(6)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), theirs, rtol=1e-10, atol=1e-12)


@check
def pipelining(rank: int, n: int) -> None:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    def pieces() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Sequential(nn.Linear(7, 7), nn.Tanh()).double() for _ in range(n)]

    def distance(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (out - target).square().mean()

    for kind in (ScheduleGPipe, Schedule1F1B):
        mine, plain = pieces()[rank], nn.Sequential(*pieces())
        stage = PipelineStage(mine, rank, n, torch.device("cpu"))
        schedule = kind(stage, n_microbatches=4, loss_fn=distance)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (mine, plain)]
        for step in range(3):
            x, _ = training.samples(step)
            target = x.cos()
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses: list[torch.Tensor] = []
            given = {"target": target, "losses": losses} if rank == n - 1 else {}
            schedule.step(*([x] if rank == 0 else []), **given)
            expected = distance(plain(x), target)
            expected.backward()
            if rank == n - 1:
                torch.testing.assert_close(torch.stack(losses).mean(), expected, rtol=1e-12, atol=0)
            for optimizer in optimizers:
                optimizer.step()
        for found, right in zip(mine.parameters(), plain[rank].parameters(), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


ENGINE_RUNS = {
    **{f"stage {stage}": training.config(stage, 4) for stage in range(4)},
    **{f"stage {stage}, bf16": training.config(stage, 4, bf16=True) for stage in (0, 2, 3)},
    **{f"stage {stage}, aligned": training.config(stage, 4, xtrain={"aligned": True}) for stage in range(4)},
}
"""What xtrain's engine trains on MPI here, and on gloo in the test's own process pool."""


def engine(run: str) -> list[str]:
    """The losses of one run, exactly."""
    return [loss.hex() for loss in training.train(ENGINE_RUNS[run], 5)["losses"]]


@check
def engine_in_every_stage(rank: int, n: int) -> dict[str, list[str]]:
    return {run: engine(run) for run in ENGINE_RUNS}
