"""zero.Init: models that are never whole, and what construction code may do to divided parameters."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import toys, training
from tests.zero.test_stage3 import engine_of, ids_of
from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.zero.home import home_of


def _built() -> dict[str, Any]:
    class Initialised(nn.Module):
        """Initialises its children's weights in every way that models do it."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.first = nn.Linear(6, 6)
            self.first.weight.data.normal_(std=0.5)
            nn.init.zeros_(self.first.bias)
            self.list = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
            self.apply(self._init)
            with torch.no_grad():
                self.list[0].weight.mul_(2.0)
            self.last = nn.Linear(6, 6)
            self.last.weight = self.first.weight

        @staticmethod
        def _init(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight)
                module.bias.data.fill_(0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for layer in self.list:
                x = layer(x)
            return self.last(x)

    original = nn.Module.__init__
    with xtrain.zero.Init():
        model = Initialised()
    plain = Initialised()
    found = {"divided": all(tuple(p.shape) == (0,) for p in model.parameters())}
    found["names"] = [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    with xtrain.zero.GatheredParameters(model):
        found["equal"] = all(
            torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
        )
        found["forward"] = torch.equal(model(torch.ones(2, 6)), plain(torch.ones(2, 6)))
    found["again"] = all(tuple(p.shape) == (0,) for p in model.parameters())
    found["restored"] = nn.Module.__init__ is original
    return found


@pytest.mark.parametrize("ranks_", [1, 2, 3])
def test_a_model_built_divided_has_the_values_of_one_built_whole(ranks: Any, ranks_: int) -> None:
    for found in ranks(ranks_, _built):
        assert all(found.values()), found


def _trained(kind: str, init: bool, stage: int, bf16: bool) -> list[float]:
    settings = {"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": bf16}}
    if init:
        with xtrain.zero.Init(config_dict_or_path=settings):
            model = toys.LanguageModel(kind)
        assert model.embed.weight.dtype == (torch.bfloat16 if bf16 else torch.float32)
    else:
        model = toys.LanguageModel(kind)
    engine = engine_of(model, stage, bf16={"enabled": bf16})
    losses = []
    for step in range(4):
        loss = engine(ids_of(engine.global_rank, step))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["", "tied", "frozen"])
@pytest.mark.parametrize("stage", [1, 3])
def test_training_after_init_is_training(ranks: Any, kind: str, stage: int) -> None:
    assert ranks(2, _trained, kind, True, stage, False) == ranks(2, _trained, kind, False, stage, False)


def test_training_in_bf16_after_init(ranks: Any) -> None:
    """The masters start from bf16 values here, as in DeepSpeed, where a model built whole has float32 ones."""
    for divided, whole in zip(
        ranks(2, _trained, "", True, 3, True), ranks(2, _trained, "", False, 3, True), strict=True
    ):
        assert divided == pytest.approx(whole, rel=1e-2)


def _tensors() -> list[torch.Tensor]:
    gc.collect()
    return [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]


def _tensor_bytes() -> int:
    storages = {}
    for item in _tensors():
        storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def _peak_of_construction() -> tuple[int, int, int]:
    class Watched(nn.Linear):
        most = 0

        def __init__(self) -> None:
            super().__init__(256, 256)
            Watched.most = max(Watched.most, _tensor_bytes())

    kept = _tensors()  # of earlier tests, which must not go away in between
    before = _tensor_bytes()
    Watched.most = 0
    with xtrain.zero.Init():
        model = nn.Sequential(*[nn.Sequential(Watched(), Watched()) for _ in range(8)])
    size = 16 * (256 * 256 + 256) * 4
    peak = Watched.most - before
    after = _tensor_bytes() - before
    del kept
    engine = engine_of(model, persistent=0)
    x = torch.ones(2, 256)
    engine.backward(engine(x).square().mean())
    engine.step()
    return size, peak, after


def test_no_rank_ever_holds_the_whole_model(ranks: Any) -> None:
    for size, peak, after in ranks(4, _peak_of_construction):
        assert after == pytest.approx(size / 4, rel=0.02)
        assert peak <= size / 4 + 3 * size / 16


def _nested_and_disabled() -> list[bool]:
    with xtrain.zero.Init():
        outer = nn.Linear(4, 4)
        with xtrain.zero.Init(dtype=torch.bfloat16):
            inner = nn.Linear(4, 4)
        with xtrain.zero.Init(enabled=False):
            pass
        last = nn.Linear(4, 4)
    with xtrain.zero.Init(enabled=False):
        plain = nn.Linear(4, 4)
    given = nn.Linear(4, 4)
    xtrain.zero.Init(module=given)
    return [
        *(home_of(m.weight) is not None for m in (outer, inner, last, given)),
        inner.weight.dtype == torch.bfloat16 and outer.weight.dtype == torch.float32,
        home_of(plain.weight) is None,
    ]


def test_nested_disabled_and_afterwards(ranks: Any) -> None:
    assert all(ranks(2, _nested_and_disabled)[0])


def _raised() -> bool:
    with pytest.raises(RuntimeError, match="constructor"), xtrain.zero.Init():
        raise RuntimeError("constructor")
    return home_of(nn.Linear(2, 2).weight) is None


def test_an_exception_in_a_constructor_leaves_torch_as_it_was(ranks: Any) -> None:
    assert ranks(2, _raised)[0]


def _modified_inside() -> list[float]:
    with xtrain.zero.Init():
        model = nn.Sequential(nn.Linear(4, 4))
        with xtrain.zero.GatheredParameters(model[0].weight, modifier_rank=0):
            if xtrain.comm.get_rank() == 0:
                nn.init.constant_(model[0].weight, 3.0)
    with xtrain.zero.GatheredParameters(model):
        return model[0].weight.unique().tolist()


def test_gathered_parameters_inside_init(ranks: Any) -> None:
    assert ranks(2, _modified_inside) == [[3.0], [3.0]]


def _refused() -> list[str]:
    said = []
    for arguments in ({"remote_device": "nvme"}, {"zero_quantized_weights": True}):
        with pytest.raises(NotImplementedYetError) as caught:
            xtrain.zero.Init(**arguments)
        said.append(str(caught.value))
    with pytest.raises(ConfigError) as wrong:
        xtrain.zero.Init(dtype=torch.int32)
    return [*said, str(wrong.value)]


def test_what_is_not_there_is_refused(ranks: Any) -> None:
    said = ranks(1, _refused)[0]
    assert "nvme" in said[0]
    assert "zero_quantized_weights" in said[1]
    assert "floating" in said[2]


def _disagree() -> str:
    with xtrain.zero.Init():
        model = nn.Linear(4, 4 + xtrain.comm.get_rank() * 0)
    engine_config = training.config(3)
    engine_config["gradient_clipping"] = 1.0 + xtrain.comm.get_rank()
    with pytest.raises(ConfigError) as caught:
        xtrain.initialize(model=model, config=engine_config)
    return str(caught.value)


def test_disagreement_is_found_with_divided_parameters(ranks: Any) -> None:
    assert "different configs" in ranks(2, _disagree)[0]


def _initialised_by_shape() -> None:
    class InitialisesByShape(nn.Module):
        """Initialises what it is made of in its constructor, as nn.Transformer and many scripts do."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 6) for _ in range(5)])
            for index, init in enumerate(
                (nn.init.xavier_uniform_, nn.init.kaiming_normal_, nn.init.orthogonal_)
            ):
                init(self.layers[index].weight)
            self.layers[3].weight[0].data.fill_(3.0)
            self.layers[4].weight.data[:, 1] = self.layers[3].weight.clone().data[0, 0]
            for param in self.parameters():
                if param.dim() > 1 and param.size(-1) == 4 and param.shape[0] == 6 and param.numel() == 24:
                    with torch.no_grad():
                        param.mul_(2.0)

    torch.manual_seed(3)
    plain = InitialisesByShape()
    torch.manual_seed(3)
    with xtrain.zero.Init():
        divided = InitialisesByShape()
    assert not any(param.numel() for param in divided.parameters())
    with xtrain.zero.GatheredParameters(divided):
        for name, param in divided.named_parameters():
            torch.testing.assert_close(param, plain.get_parameter(name), rtol=0, atol=0, msg=name)


def test_a_constructor_may_initialise_what_it_is_made_of(ranks: Any) -> None:
    ranks(2, _initialised_by_shape)
