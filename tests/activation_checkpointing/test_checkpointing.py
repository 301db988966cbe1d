"""xtrain.checkpointing against the same model without it: bit for bit, dropout included."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import xtrain
from tests import toys, training
from xtrain.activation_checkpointing import checkpointing, random_states
from xtrain.activation_checkpointing.checkpointing import (
    checkpoint,
    get_cuda_rng_tracker,
    non_reentrant_checkpoint,
)
from xtrain.base.errors import ConfigError


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    _forget()


def _forget() -> None:
    checkpointing._state.__init__()  # type: ignore[misc]
    random_states.tracker.reset()


RUNNERS = {"reentrant": checkpoint, "not": non_reentrant_checkpoint}


def _plain(function: Any, *args: Any) -> Any:
    return function(*args)


def _gradients(how: str, steps: int = 2, **options: Any) -> list[torch.Tensor]:
    torch.manual_seed(1)
    model = toys.DropoutStack(RUNNERS.get(how, _plain), **options)
    checkpointing.model_parallel_cuda_manual_seed(11)
    results = []
    for step in range(steps):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step), requires_grad=True)
        model.zero_grad()
        out = model(x)
        out.square().mean().backward()
        results += [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
        results.append(torch.rand(2))  # both ways, the generator goes on from the same place
        with get_cuda_rng_tracker().fork():
            results.append(torch.rand(2))
    return results


@pytest.mark.bits
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("how", ["reentrant", "not"])
def test_gradients_are_those_of_the_plain_model(how: str, nested: bool) -> None:
    plain = _gradients("plain")
    assert all(torch.equal(a, b) for a, b in zip(plain, _gradients(how, nested=nested), strict=True))


class ModelParallelUnit:
    """Every rank is model parallel."""

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_model_parallel_group(self) -> Any:
        return dist.group.WORLD


def _partitioned(how: str, contiguous: bool, nested: bool) -> tuple[bool, list[int]]:
    named = False  # the named state differs between model-parallel ranks
    checkpointing.configure(ModelParallelUnit())
    plain = _gradients("plain", named=named)
    checkpointing.configure(
        ModelParallelUnit(),
        partition_activations=True,
        contiguous_checkpointing=contiguous,
        num_checkpoints=2,
    )
    assert checkpointing.is_configured()
    kept: list[int] = []
    pack = checkpointing.ActivationStore._pack

    def watched(self: Any, tensor: torch.Tensor) -> Any:
        packed = pack(self, tensor)
        kept.append(packed.piece.numel() if isinstance(packed, tuple) else -tensor.numel())
        return packed

    checkpointing.ActivationStore._pack = watched  # type: ignore[method-assign]
    try:
        same = all(
            torch.equal(a, b) for a, b in zip(plain, _gradients(how, named=named, nested=nested), strict=True)
        )
    finally:
        checkpointing.ActivationStore._pack = pack  # type: ignore[method-assign]
        _forget()
    return same, kept


@pytest.mark.bits
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("how", ["reentrant", "not"])
def test_partitioned_activations(ranks: Any, how: str, contiguous: bool) -> None:
    for same, kept in ranks(2, _partitioned, how, contiguous, True):
        assert same
        assert kept == [15, 3] * 4  # half of x (30) and of the mask (6), two checkpoints in two steps
    same, kept = ranks(1, _partitioned, how, contiguous, False)[0]
    assert same  # with one model-parallel rank they are kept whole
    assert kept == ([30, 6] * 4 if contiguous else [-30, -6] * 4)


def _odd_sizes() -> tuple[torch.Tensor, torch.Tensor]:
    """Nine elements over two ranks, one element, and a tensor that asks to be left alone."""
    results = []
    for configured in (False, True):
        if configured:
            checkpointing.configure(ModelParallelUnit(), partition_activations=True)
        x = torch.arange(9.0).requires_grad_()
        scale = torch.tensor(2.0, requires_grad=True)
        left = torch.ones(9, requires_grad=True)
        left.no_checkpointing = True  # type: ignore[attr-defined]
        checkpoint(lambda x, s, y: (x.sin() * s * y).sum(), x, scale, left).backward()
        results.append(torch.cat([x.grad, scale.grad[None], left.grad]))
    _forget()
    return results[0], results[1]


@pytest.mark.bits
def test_sizes_that_do_not_divide(ranks: Any) -> None:
    for plain, split in ranks(2, _odd_sizes):
        assert torch.equal(plain, split)


@pytest.mark.bits
@pytest.mark.parametrize("how", ["reentrant", "not"])
def test_activations_on_the_host(how: str) -> None:
    """The host's own tensors are there already."""
    checkpointing.configure(None, checkpoint_in_cpu=True)
    plain = _gradients("plain")
    assert all(torch.equal(a, b) for a, b in zip(plain, _gradients(how), strict=True))
    store = checkpointing.ActivationStore(checkpointing.ModelParallelGrid(), True, None)
    there = torch.ones(3, 4)
    assert store._pack(there) is there
    away = checkpointing.ActivationStore(checkpointing.ModelParallelGrid(), True, checkpointing.Arena(1))
    packed = away._pack(there)
    assert packed.piece.device.type == "cpu"
    assert torch.equal(away._unpack(packed), there)


def test_keyword_arguments_and_single_outputs() -> None:
    x, y = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    out = checkpoint(lambda x, y, n: [x * y * n], x, y=y, n=3)
    assert torch.is_tensor(out)
    out.sum().backward()
    assert x.grad.tolist() == [6.0] * 3
    assert y.grad.tolist() == [3.0] * 3
    outputs: list[Any] = []
    returned = checkpointing.CheckpointFunction.apply(lambda x: (x, x * 2), outputs, x)
    assert [torch.is_tensor(item) for item in outputs] == [True, True]
    assert len(returned) == 2
    with pytest.raises(ConfigError, match="returned dict"):
        checkpoint(lambda x: {"a": x}, x)
    result = non_reentrant_checkpoint(lambda x: {"a": x.exp()}, x)
    result["a"].sum().backward()


def test_no_argument_needs_a_gradient_when_not_reentrant() -> None:
    layer = nn.Linear(2, 2)
    non_reentrant_checkpoint(layer, torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is not None


def test_autocast_is_restored() -> None:
    layer, x = nn.Linear(4, 4), torch.ones(2, 4, requires_grad=True)
    grads = []
    for run in (lambda f, x: f(x), checkpoint, non_reentrant_checkpoint):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = run(layer, x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        grads.append(layer.weight.grad.clone())
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_contiguous_blocks_say_when_they_are_full() -> None:
    with pytest.raises(ConfigError, match="need partition_activations"):
        checkpointing.configure(None, contiguous_checkpointing=True)
    with pytest.raises(ConfigError, match="need number_checkpoints"):
        checkpointing.configure(None, partition_activations=True, contiguous_checkpointing=True)
    checkpointing.configure(
        None, partition_activations=True, contiguous_checkpointing=True, num_checkpoints=1
    )
    x = torch.ones(3, requires_grad=True)
    checkpoint(torch.exp, x)
    with pytest.raises(ConfigError, match="number_checkpoints"):
        checkpoint(torch.exp, x)
    checkpointing.reset()
    checkpoint(torch.exp, x).sum().backward()
    checkpointing.set_num_layers(2)
    assert checkpointing._state.arena.rows == 2


def test_the_tracker() -> None:
    tracker = get_cuda_rng_tracker()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tracker.add("first", 1)
    tracker.add("second", 2)
    with tracker.fork("first"):
        drawn = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)  # nothing outside has moved
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(1)))
    states = tracker.get_states()
    with tracker.fork("first"):
        once = torch.rand(3)
    tracker.set_states(states)
    with tracker.fork("first"):
        assert torch.equal(torch.rand(3), once)
    for name, seed, said in (("first", 9, "called 'first'"), ("third", 1, "seed 1")):
        with pytest.raises(ConfigError, match=said):
            tracker.add(name, seed)
    with pytest.raises(ConfigError, match="no random state is called 'model-parallel-rng'"), tracker.fork():
        pass


def _seeds() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    checkpointing.configure(ModelParallelUnit())
    checkpointing.model_parallel_cuda_manual_seed(3)
    default = torch.rand(2)
    with get_cuda_rng_tracker().fork():
        named = torch.rand(2)
    checkpointing.model_parallel_reconfigure_tp_seed(3)
    with get_cuda_rng_tracker().fork():
        again = torch.rand(2)
    _forget()
    return default, named, again


def test_model_parallel_seeds(ranks: Any) -> None:
    (default, named, again), (default1, named1, again1) = ranks(2, _seeds)
    assert torch.equal(default, default1)
    assert not torch.equal(named, named1)
    assert torch.equal(named, again)
    assert torch.equal(named1, again1)
    # The seeds are Megatron's.
    assert torch.equal(named, torch.rand(2, generator=torch.Generator().manual_seed(3 + 2718)))
    assert torch.equal(named1, torch.rand(2, generator=torch.Generator().manual_seed(3 + 2719)))


@pytest.mark.parametrize("how", RUNNERS)
def test_profile_logs_both_passes(caplog: pytest.LogCaptureFixture, how: str) -> None:
    caplog.set_level(logging.INFO, logger="xtrain")
    checkpointing.configure(None, profile=True, synchronize=True)
    RUNNERS[how](torch.exp, torch.ones(1, requires_grad=True)).backward()
    assert [line.split(" took")[0] for line in caplog.messages if " took " in line] == [
        "activation checkpoint: forward",
        "activation checkpoint: recomputation",
    ]


def _from_config() -> list[bool]:
    seen = []
    section = {"activation_checkpointing": {"partition_activations": True, "profile": False}}
    _forget()
    xtrain.initialize(model=training.build_model(), config=training.config(0))
    seen.append(checkpointing.is_configured())
    xtrain.initialize(model=training.build_model(), config=training.config(0, **section))
    seen += [checkpointing.is_configured(), checkpointing._state.settings.partition_activations]
    checkpointing.configure(None, deepspeed_config=training.config(0, **section), partition_activations=False)
    xtrain.initialize(model=training.build_model(), config=training.config(0, **section))
    seen.append(checkpointing._state.settings.partition_activations)
    _forget()
    return seen


def test_initialize_applies_the_section_unless_the_script_has_configured(ranks: Any) -> None:
    assert ranks(1, _from_config)[0] == [False, True, True, False]


def _train(how: str, stage: int) -> list[float]:
    class Trained(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.inputs, self.outputs = nn.Linear(toys.FEATURES, 6), nn.Linear(6, toys.OUTPUTS)
            self.stack = toys.DropoutStack(RUNNERS.get(how, _plain), named=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.outputs(self.stack(self.inputs(x)))

    torch.manual_seed(2)
    model = Trained(how)
    engine = xtrain.initialize(model=model, config=training.config(stage, micro=8))[0]
    torch.manual_seed(3 + xtrain.comm.get_rank())
    return [training.engine_step(engine, step) for step in range(5)]


@pytest.mark.bits
@pytest.mark.parametrize("stage", [0, 2])
def test_in_training_the_curve_is_the_same(ranks: Any, stage: int) -> None:
    plain = ranks(2, _train, "plain", stage)[0]
    for how in RUNNERS:
        assert ranks(2, _train, how, stage)[0] == plain


@pytest.mark.deepspeed
def test_the_names_are_deepspeeds() -> None:
    import inspect

    theirs = pytest.importorskip(
        "deepspeed.runtime.activation_checkpointing.checkpointing", reason="needs the extra deepspeed"
    )
    for name in (
        "configure", "checkpoint", "non_reentrant_checkpoint", "is_configured", "reset", "set_num_layers",
        "get_cuda_rng_tracker", "model_parallel_cuda_manual_seed", "model_parallel_reconfigure_tp_seed",
        "partition_activations_in_checkpoint",
    ):  # fmt: skip
        ours = list(inspect.signature(getattr(checkpointing, name)).parameters)
        assert ours == list(inspect.signature(getattr(theirs, name)).parameters), name
