"""ZeRO stage 3: data that a script assigns to parameters is taken over or refused; one rank is divided too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import toys
from xtrain.base.errors import ConfigError
from xtrain.zero import GatheredParameters, ZeroParamStatus

Ranks = Callable[..., list[Any]]


def _engine(model: nn.Module, lr: float = 0.0, threshold: int = 0, **extra: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "weight_decay": 0.0}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": threshold},
        **extra,
    }
    return xtrain.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def _whole(param: nn.Parameter) -> torch.Tensor:
    with GatheredParameters(param):
        return param.detach().float().clone()


def _step(engine: Any) -> None:
    engine.backward(engine(torch.ones(1, 4, dtype=engine.module[0].weight.dtype)).float().sum())
    engine.step()


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def _tensor_data(param: Any) -> None:
    param.ds_tensor.data = torch.full_like(param.ds_tensor, 3.0)


def _tensor_itself(param: Any) -> None:
    param.ds_tensor = torch.full_like(param.ds_tensor, 3.0)


def _in_place(param: Any) -> None:
    param.ds_tensor.data.copy_(torch.full_like(param.ds_tensor, 3.0))


def _data(param: Any) -> None:
    param.data = torch.full(param.ds_shape, 3.0, dtype=param.dtype)


WAYS: dict[str, Callable[[Any], None]] = {
    "ds_tensor.data": _tensor_data,
    "ds_tensor": _tensor_itself,
    "copy_": _in_place,
    "data": _data,
}


def _assigned(how: str, bf16: bool, threshold: int) -> None:
    model = _model()
    engine = _engine(model, threshold=threshold, bf16={"enabled": bf16})
    weight, other = model[0].weight, model[1].weight
    untouched = _whole(other)
    dtype = weight.dtype
    before = engine(torch.ones(1, 4, dtype=dtype)).detach()
    WAYS[how](weight)
    if not threshold:
        assert torch.equal(_whole(weight), torch.full((4, 4), 3.0))
        assert weight.numel() == 0
        assert not torch.equal(engine(torch.ones(1, 4, dtype=dtype)), before)
    assert torch.equal(_whole(other), untouched)
    if not bf16:  # separate masters keep their values, and the next step brings those back, as in DeepSpeed
        WAYS[how](weight)
        _step(engine)  # with a learning rate of zero
        assert torch.equal(_whole(weight), torch.full((4, 4), 3.0))
        state = engine.module_state_dict()
        assert torch.equal(state["0.weight"], torch.full((4, 4), 3.0))
    # What the script holds afterwards is this rank's part again.
    weight.ds_tensor.data.fill_(2.0)
    if not threshold:
        assert torch.equal(_whole(weight), torch.full((4, 4), 2.0))


@pytest.mark.parametrize("ranks_of", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_assigned_data_are_the_value_from_then_on(ranks: Ranks, how: str, bf16: bool, ranks_of: int) -> None:
    ranks(ranks_of, _assigned, how, bf16, 0)


@pytest.mark.parametrize("how", ["ds_tensor.data", "ds_tensor", "data"])
def test_assigned_data_of_parameters_that_stay_whole(ranks: Ranks, how: str) -> None:
    ranks(2, _assigned, how, False, 100)


def _masters() -> None:
    model = _model()
    engine = _engine(model)
    for master in engine.optimizer.fp32_partitioned_groups_flat:
        master.data = torch.full_like(master, 5.0)
    _step(engine)
    for param in model.parameters():
        assert torch.equal(_whole(param), torch.full(param.ds_shape, 5.0))


def test_assigned_masters_are_the_value_after_the_next_step(ranks: Ranks) -> None:
    ranks(2, _masters)


def _while_running() -> None:
    class Rounding(nn.Module):
        """Replaces its weight while it runs, as quantisation does."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x)
            self.inner.weight.data = torch.full_like(self.inner.weight, 0.5)
            return y

    model = nn.Sequential(Rounding())
    engine = _engine(model)
    engine.module(torch.ones(1, 4))
    assert torch.equal(_whole(model[0].inner.weight), torch.full((4, 4), 0.5))


def test_data_assigned_while_the_module_runs(ranks: Ranks) -> None:
    ranks(2, _while_running)


def _wrong_sizes() -> list[str]:
    said = []
    for how in ("ds_tensor", "data", "dtype"):
        model = _model()
        engine = _engine(model)
        weight: Any = model[0].weight
        if how == "ds_tensor":
            weight.ds_tensor.data = torch.zeros(5)
        else:
            shape = (4, 4) if how == "dtype" else (2, 8)
            weight.data = torch.zeros(shape, dtype=torch.float64 if how == "dtype" else torch.float32)
        with pytest.raises(ConfigError) as caught:
            engine(torch.ones(1, 4))
        said.append(str(caught.value))
    return said


def test_what_does_not_fit_is_refused(ranks: Ranks) -> None:
    for said in ranks(2, _wrong_sizes):
        assert all("'0.weight'" in sentence for sentence in said)
        assert "GatheredParameters" in said[0]
        assert "(2, 8)" in said[1]
        assert "float64" in said[2]


# ---------------------------------------------------------------- one rank


def _one_rank() -> list[float]:
    """DeepSpeed 0.19.8 on one rank: divided parameters are empty between uses, `ds_tensor` has all of them."""
    model = _model()
    engine = _engine(model, lr=0.1, threshold=4)
    weight, bias = model[0].weight, model[0].bias
    assert (weight.numel(), weight.ds_numel, weight.ds_tensor.numel()) == (0, 16, 16)
    assert weight.ds_status is ZeroParamStatus.NOT_AVAILABLE
    assert (bias.numel(), bias.ds_persist) == (4, True)
    assert sum(getattr(param, "ds_numel", param.numel()) for param in model.parameters()) == 40
    with GatheredParameters(model.parameters()):
        assert weight.shape == (4, 4)
    assert tuple(engine.module.state_dict()["0.weight"].shape) == (0,)
    losses = []
    for _ in range(3):
        loss = engine(torch.ones(1, 4)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        assert weight.numel() == 0
    # Nothing is copied to make them whole.
    with GatheredParameters(model.parameters()):
        shard = engine.partition.sharded[0].shard
    engine.partition.gatherer.unshard(unit := engine.partition.gatherer.param_groups[0])
    assert any(
        param.untyped_storage().data_ptr() == shard.untyped_storage().data_ptr()
        for param in model.parameters()
    )
    engine.partition.gatherer.reshard(unit)
    return losses


def test_one_rank_is_divided_like_many(ranks: Ranks) -> None:
    (found,) = ranks(1, _one_rank)
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    for loss in found:
        optimizer.zero_grad()
        plain = model(torch.ones(1, 4)).square().mean()
        plain.backward()
        optimizer.step()
        assert loss == pytest.approx(plain.item(), rel=1e-6)


# ---------------------------------------------------------------- leaf modules


def _eye() -> nn.Module:
    layer = nn.Linear(4, 4, bias=False)
    nn.init.eye_(layer.weight)
    return layer


def _leaf(needs_grad: bool) -> list[torch.Tensor]:
    model = nn.Sequential(toys.ByRank(_eye, head=nn.Identity()))
    xtrain.utils.set_z3_leaf_modules(model, [toys.ByRank])
    engine = _engine(
        model, zero_allow_untested_optimizer=True, optimizer={"type": "SGD", "params": {"lr": 1.0}}
    )
    for _ in range(2):
        engine.backward(engine(torch.full((1, 4), 2.0, requires_grad=needs_grad)).sum())
        engine.step()
    return [_whole(param) for param in model.parameters()]


@pytest.mark.parametrize("needs_grad", [True, False])
def test_leaf_modules_with_and_without_gradients_of_inputs(ranks: Ranks, needs_grad: bool) -> None:
    """Right whatever the inputs need. DeepSpeed 0.19.8 fails without ("size of tensor a (0) must match")."""
    for weights in ranks(2, _leaf, needs_grad):
        for (
            weight
        ) in weights:  # each layer ran on one rank of two, with a gradient of 2: 1 in the mean, twice
            assert torch.equal(weight, torch.eye(4) - 2.0)
