"""ZeRO stage 3 when ranks run different modules: an error on every rank before any update, whatever the sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import toys, training
from xtrain.base.errors import TrainingError
from xtrain.zero.order import GatherOrder, number_of

WIDTH = 6


def _engine(model: nn.Module, lr: float = 1.0, **more: Any) -> Any:
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": training.zero(3, 0, **more),
        "optimizer": {"type": "AdamW", "params": {"lr": lr}},
    }
    return xtrain.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]


CASES: dict[str, tuple[tuple[int, int], tuple[list[str], list[str]]]] = {
    "equal sizes": ((5, 5), (["image"], ["text"])),
    "other sizes": ((5, 70), (["image"], ["text"])),
    "another order": ((5, 5), (["image", "text"], ["text", "image"])),
    "one more": ((5, 5), (["image", "text"], ["image"])),
    "one more, larger": ((5, 70), (["image", "text"], ["image"])),
    "one less": ((5, 70), (["text"], ["image", "text"])),
}


def _step(engine: Any, x: torch.Tensor, heads: list[str], own_backward: bool) -> None:
    loss = engine(x, heads)
    if own_backward:
        loss.backward()
    else:
        engine.backward(loss)
    engine.step()


def _differ(case: str, own_backward: bool, warm: bool, **more: Any) -> list[str]:
    hidden, choice = CASES[case]
    torch.manual_seed(0)
    engine = _engine(toys.Heads(WIDTH, hidden), **more)
    x = torch.randn(2, WIDTH)
    if warm:  # gathers ahead from then on
        for _ in range(2):
            engine.backward(engine(x, ["image", "text"]))
            engine.step()
    masters = [master.detach().clone() for master in engine.optimizer.masters]
    said = []
    for heads in (choice[engine.global_rank], ["image"]):  # the second shows that nothing goes on
        with pytest.raises(TrainingError) as caught:
            _step(engine, x, heads, own_backward)
        said.append(str(caught.value))
    with pytest.raises((TrainingError, xtrain.base.errors.ConfigError)):
        engine.step()
    assert all(torch.equal(*pair) for pair in zip(masters, engine.optimizer.masters, strict=True))
    return said


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("own_backward", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_ranks_that_run_different_modules(ranks: Any, case: str, own_backward: bool, warm: bool) -> None:
    first, second = ranks(2, _differ, case, own_backward, warm)
    assert first == second
    assert first[0] == first[1]
    assert "ran different modules" in first[0]
    assert "'image." in first[0] or "'text." in first[0]


def _leaves() -> dict[str, torch.Tensor]:
    """What the error proposes."""
    torch.manual_seed(0)
    model = toys.Heads(WIDTH, (5, 5))
    xtrain.utils.set_z3_leaf_modules(model, [toys.Heads])
    engine = _engine(model, lr=0.1)
    for _ in range(2):
        engine.backward(engine(torch.ones(2, WIDTH), [("image", "text")[engine.global_rank]]))
        engine.step()
    return {name: value.clone() for name, value in engine.module_state_dict().items()}


def test_leaf_modules_may_differ(ranks: Any) -> None:
    found = ranks(2, _leaves)[0]
    torch.manual_seed(0)
    model = toys.Heads(WIDTH, (5, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        (model(torch.ones(2, WIDTH), ["image", "text"]) / 2).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value)


def _other_parameters() -> str:
    model = toys.Heads(WIDTH, (5, 5))
    _engine(model)
    mine = (model.image, model.text)[xtrain.comm.get_rank()]
    with pytest.raises(TrainingError) as caught, xtrain.zero.GatheredParameters(mine[0].weight):
        pass
    return str(caught.value)


def test_gathering_different_parameters_by_hand(ranks: Any) -> None:
    first, second = ranks(2, _other_parameters)
    assert first == second
    assert "rank 0 needs some parameters of 'image.0'; rank 1 needs some parameters of 'text.0'" in first


def _evaluate_and_train(batches: int) -> None:
    engine = _engine(toys.Heads(WIDTH, (5, 70)))
    x = torch.randn(2, WIDTH)
    with torch.no_grad():
        for _ in range(batches):
            engine(x, ["text"])
    for _ in range(3):
        _step(engine, x, ["text"], own_backward=False)


def _uneven_evaluation() -> str:
    with pytest.raises(TrainingError) as caught:
        _evaluate_and_train(2 - xtrain.comm.get_rank())
    return str(caught.value)


def test_an_evaluation_that_is_longer_on_one_rank(ranks: Any) -> None:
    first, second = ranks(2, _uneven_evaluation)
    assert first == second


def _digest(same: bool) -> str:
    """As on accelerators, whose numbers are compared once an update."""
    order = GatherOrder(["a", "b"], None, torch.device("cpu"))
    order._each = False
    for _ in range(2):
        for number in (0, 1) if same or xtrain.comm.get_rank() else (1, 0):
            order.compare(order.announce(number))
        order.end()
        try:
            order.before_update()
        except TrainingError as error:
            return str(error)
    return ""


def test_comparing_once_an_update(ranks: Any) -> None:
    assert ranks(2, _digest, True) == ["", ""]
    for said in ranks(2, _digest, False):
        assert "ran different modules" in said


def test_numbers_of_parameters_and_groups_differ() -> None:
    assert (
        len({number_of(3), number_of(4), number_of(3, ["x"]), number_of(3, ["y"]), number_of(4, ["x"])}) == 5
    )
