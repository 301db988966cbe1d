"""apex.parallel on ranks: gradients that are averaged, batch norm over ranks, LARC."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import distributed, nn

from xtrain.base.errors import NotImplementedYetError
from xtrain.shims.apex import parallel


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def data(rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(7))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [param.grad.clone() for param in model.parameters()]


def _averages() -> dict[str, list[torch.Tensor]]:
    rank = distributed.get_rank()
    part = data()[rank * 4 : rank * 4 + 4]
    found = {}
    for name, options in {
        "mean": {},
        "small buckets": {"message_size": 1, "allreduce_always_fp32": True},
        "predivided": {"gradient_predivide_factor": 4.0},
        "sum": {"gradient_average": False},
    }.items():
        model = nn.Linear(3, 1)  # of each rank's own; made rank 0's
        with torch.no_grad():
            model.weight.fill_(1.0 + rank)
            model.bias.fill_(0.0)
        wrapped = parallel.DistributedDataParallel(model, **options)
        wrapped(part).square().mean().backward()
        found[name] = gradients(model)
    wrapped.disable_allreduce()
    model.zero_grad()
    wrapped(part).square().mean().backward()
    found["alone"] = gradients(model)
    reducer = parallel.Reducer(model)
    reducer.reduce()
    found["reduced"] = gradients(model)
    return found


def test_gradients_are_those_of_the_whole_batch(ranks):
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(0.0)
    model(data()).square().mean().backward()
    wanted = gradients(model)
    first, second = ranks(2, _averages)
    for name in ("mean", "small buckets", "predivided", "reduced"):
        for one, other, whole in zip(first[name], second[name], wanted, strict=True):
            assert torch.equal(one, other)
            torch.testing.assert_close(one, whole)
    for summed, whole in zip(first["sum"], wanted, strict=True):
        torch.testing.assert_close(summed, 2 * whole)
    assert not torch.equal(first["alone"][0], second["alone"][0])


def _normalised() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    rank = distributed.get_rank()
    model = parallel.convert_syncbn_model(network())
    assert isinstance(model[1], parallel.SyncBatchNorm)
    mine = data()[:3] if rank == 0 else data()[3:]  # of different sizes
    result = model(mine)
    result.square().sum().backward()
    for param in model.parameters():
        distributed.all_reduce(param.grad)
    group = parallel.create_syncbn_process_group(1)
    assert distributed.get_world_size(group) == 1
    return result.detach(), gradients(model), model[1].running_var


def test_batch_norm_is_over_all_ranks(ranks):
    model = network()
    whole = model(data())
    whole.square().sum().backward()
    (first, grads, variance), (second, _, _) = ranks(2, _normalised)
    torch.testing.assert_close(torch.cat([first, second]), whole.detach())
    torch.testing.assert_close(variance, model[1].running_var)
    for found, wanted in zip(grads, gradients(model), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_batch_norm_alone_is_torchs():
    ours, theirs = parallel.SyncBatchNorm(3, channel_last=True), nn.BatchNorm2d(3)
    x = torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(ours(x), theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    assert parallel.SyncBatchNorm(3, fuse_relu=True)(torch.randn(4, 3)).min() >= 0


@pytest.mark.parametrize("clip", [True, False])
def test_larc_scales_gradients(clip):
    param = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = parallel.LARC(torch.optim.SGD([param], lr=0.1, weight_decay=0.5), clip=clip)
    param.grad = torch.tensor([0.6, 0.8])
    before = copy.deepcopy(param.detach())
    optimizer.step()
    rate = 0.02 * 5 / (1 + 5 * 0.5)
    rate = min(rate / 0.1, 1) if clip else rate
    torch.testing.assert_close(
        param.detach(), before - 0.1 * rate * (torch.tensor([0.6, 0.8]) + 0.5 * before)
    )
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.1


def _refusals() -> None:
    with pytest.raises(NotImplementedYetError, match="retain_allreduce_buffers"):
        parallel.DistributedDataParallel(nn.Linear(1, 1), retain_allreduce_buffers=True)
    with pytest.raises(ValueError, match="delay_allreduce"):
        parallel.DistributedDataParallel(nn.Linear(1, 1), shared_param=True)


def test_what_is_refused(ranks):
    ranks(2, _refusals)
