"""Training under an mpu: tensor, pipeline and sequence parallelism against one process, and against real DeepSpeed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import xtrain
from tests.live_deepspeed import fresh_deepspeed, live_deepspeed
from tests.parallel.training import CLIP, config, reference, train
from tests.toys import FEATURES, OUTPUTS, Half, ParallelMLP, shard
from tests.training import GLOBAL_BATCH, samples
from xtrain.align.record import read_record
from xtrain.base.errors import CheckpointError, ConfigError, NotImplementedYetError
from xtrain.checkpoint import loads as agreement
from xtrain.parallel import ProcessGrid

STEPS = 5


class OldMegatron:
    """The names that an mpu had before there were pipelines, and no others."""

    def __init__(self, grid: ProcessGrid) -> None:
        for what in ("group", "rank", "world_size"):
            setattr(self, f"get_data_parallel_{what}", getattr(grid, f"get_data_parallel_{what}"))
            setattr(self, f"get_model_parallel_{what}", getattr(grid, f"get_tensor_model_parallel_{what}"))


def _build(stage: int, dtype: str, old: bool = False, **more: Any) -> tuple[Any, ProcessGrid]:
    grid = ProcessGrid(tensor=2)
    model = ParallelMLP(
        grid.get_tensor_model_parallel_group(), "model_parallel" if old else "tensor_model_parallel"
    )
    mpu = OldMegatron(grid) if old else grid
    engine = xtrain.initialize(model=model, config=config(stage, dtype, **more), mpu=mpu)[0]
    assert engine.grid.model.size == engine.mp_world_size == 2
    return engine, grid


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: value.double().clone() for name, value in engine.module_state_dict().items()}


def _tensor_parallel(stage: int, dtype: str, old: bool) -> Any:
    engine, grid = _build(stage, dtype, old)
    losses, norms = train(engine, grid.get_data_parallel_rank(), range(STEPS))
    rank = grid.get_tensor_model_parallel_rank()
    return grid.get_data_parallel_rank(), rank, losses, norms, _weights(engine)


@pytest.mark.parametrize(("world", "stage", "dtype", "old"), [
    (2, 0, "fp32", False), (4, 0, "fp32", True), (4, 1, "fp32", False), (4, 2, "fp32", True), (4, 3, "fp32", False),
    (4, 1, "bf16", False), (4, 3, "bf16", True),
])  # fmt: skip
def test_tensor_parallel_training_is_that_of_one_process(
    ranks: Any, world: int, stage: int, dtype: str, old: bool
) -> None:
    exact = reference(STEPS)
    assert min(exact["norms"]) > CLIP  # clipping is at work
    results = ranks(world, _tensor_parallel, stage, dtype, old)
    loose = {"rel": 0.03, "abs": 0.02} if dtype == "bf16" else {"rel": 2e-5, "abs": 2e-6}
    replicas = world // 2
    for tensor in range(2):
        mine = [result for result in results if result[1] == tensor]
        assert len(mine) == replicas
        means = [sum(losses) / replicas for losses in zip(*(result[2] for result in mine), strict=True)]
        assert means == pytest.approx(exact["losses"], **loose)
    for _, tensor, _, norms, weights in results:
        assert norms == pytest.approx(exact["norms"], **loose)
        assert norms == results[0][3]
        for name, value in weights.items():
            wanted = shard(name, exact["weights"][name], 2, tensor)
            assert value.flatten().tolist() == pytest.approx(wanted.flatten().tolist(), **loose), name


def _overflow(stage: int, name: str) -> Any:
    engine, grid = _build(stage, "fp16", gradient_accumulation_steps=1)
    poisoned = dist.get_rank() == 1  # of the second part of the model, in the first replica
    if poisoned:
        getattr(engine.module, name).register_hook(lambda grad: grad * (float("inf") if armed else 1.0))
    seen = []
    for step in range(4):
        armed = step == 2
        train(engine, grid.get_data_parallel_rank(), range(step, step + 1))
        seen.append((engine.was_step_applied(), engine.loss_scale(), engine.skipped_steps))
    return seen


@pytest.mark.parametrize(("stage", "name"), [(0, "row"), (1, "row_bias"), (2, "row"), (3, "column")])
def test_an_overflow_in_one_part_of_the_model_skips_the_step_everywhere(
    ranks: Any, stage: int, name: str
) -> None:
    """`row_bias` is replicated: the rank where it overflows does not count it in the norm."""
    for seen in ranks(4, _overflow, stage, name):
        assert seen == [(True, 256, 0), (True, 256, 0), (False, 128, 1), (True, 128, 1)]


def _save(folder: str, stage: int, dtype: str) -> Any:
    engine, grid = _build(stage, dtype)
    replica = grid.get_data_parallel_rank()
    tracker = xtrain.checkpointing.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", 100 + engine.get_tensor_parallel_rank())
    train(engine, replica, range(2))
    engine.save_checkpoint(folder, client_state={"part": engine.get_model_parallel_rank()})
    saved = _weights(engine)
    with tracker.fork():
        drawn = torch.rand(3)
    uninterrupted = train(engine, replica, range(2, STEPS))
    engine, grid = _build(stage, dtype)
    _, client = engine.load_checkpoint(folder)
    assert client == {"part": engine.get_model_parallel_rank()}
    with pytest.raises(NotImplementedYetError, match="save_16bit_model"):
        engine.save_16bit_model(folder)
    assert all(torch.equal(value, saved[name]) for name, value in _weights(engine).items())
    with tracker.fork():
        assert torch.equal(torch.rand(3), drawn)
    tracker.reset()
    assert train(engine, replica, range(2, STEPS)) == uninterrupted
    return saved, uninterrupted


def _other_parts_load_another(folder: str, in_turn: bool) -> tuple[str, bool]:
    """Ranks of the second part of the model load another checkpoint than those of the first."""
    engine, grid = _build(1, "fp32")
    replica, part = grid.get_data_parallel_rank(), engine.get_model_parallel_rank()
    for step, tag in enumerate("ab"):
        train(engine, replica, range(step, step + 1))
        engine.save_checkpoint(folder, tag)
    mark = Path(folder) / f"first part of {replica}"
    with pytest.MonkeyPatch.context() as patch:
        if in_turn:
            patch.setattr(agreement, "PATIENCE", 0.1)
            patch.setattr(agreement.Load, "compare", lambda *_: None)  # so that it is found out later
            while part and not mark.exists():
                time.sleep(0.01)
        try:
            engine.load_checkpoint(folder, "ab"[part])
        except CheckpointError as error:
            assert not in_turn
            return str(error), True
        mark.touch()
    before = [master.detach().clone() for master in engine.optimizer.masters]
    with pytest.raises(CheckpointError) as caught:
        train(engine, replica, range(2, 3))
    same = all(map(torch.equal, before, (master.detach() for master in engine.optimizer.masters)))
    return str(caught.value), same


@pytest.mark.parametrize("in_turn", [False, True])
def test_parts_of_the_model_from_different_checkpoints(ranks: Any, tmp_path: Path, in_turn: bool) -> None:
    for said, unchanged in ranks(4, _other_parts_load_another, str(tmp_path), in_turn):
        assert f"{tmp_path}/a (manifest" in said
        assert f"{tmp_path}/b (manifest" in said
        assert unchanged


def _load_elsewhere(folder: str, stage: int) -> Any:
    """On two ranks, one replica, in another stage; then in a model that is not divided."""
    engine, grid = _build(stage, "fp32")
    engine.load_checkpoint(folder)
    loaded = _weights(engine)
    losses = train(engine, grid.get_data_parallel_rank(), range(2, STEPS))
    whole = xtrain.initialize(model=ParallelMLP(), config=config(1, "fp32"))[0]
    with pytest.raises(CheckpointError) as error:
        whole.load_checkpoint(folder)
    return loaded, losses, str(error.value)


@pytest.mark.parametrize(("stage", "dtype", "other"), [(1, "fp32", 3), (3, "fp32", 0), (2, "bf16", None)])
def test_checkpoints_have_a_part_for_each_part_of_the_model(
    ranks: Any, tmp_path: Path, stage: int, dtype: str, other: int | None
) -> None:
    saved = ranks(4, _save, str(tmp_path), stage, dtype)
    names = {path.name for path in (tmp_path / "global_step2").iterdir()}
    assert {"model-part-00000-of-00002.safetensors", "state-part-00001-of-00002.pt"} <= names
    if other is None:
        return
    for rank, (loaded, (losses, norms), refusal) in enumerate(
        ranks(2, _load_elsewhere, str(tmp_path), other)
    ):
        weights = saved[rank][0]  # ranks 0 and 1 are the two parts of the first replica
        assert all(torch.equal(value, weights[name]) for name, value in loaded.items())
        halves = zip(saved[rank][1][0], saved[rank + 2][1][0], strict=True)
        assert losses == pytest.approx([sum(pair) / 2 for pair in halves], rel=1e-5)
        assert norms == pytest.approx(saved[rank][1][1], rel=1e-5)
        assert (
            "was written with tensor parallelism 2 and pipeline parallelism 1, this run has 1 and 1"
            in refusal
        )


def _from_one_checkpoint_to_two_parts(folder: str) -> str:
    xtrain.initialize(model=ParallelMLP(), config=config(1, "fp32"))[0].save_checkpoint(folder)
    engine, _ = _build(1, "fp32")
    with pytest.raises(CheckpointError) as error:
        engine.load_checkpoint(folder)
    return str(error.value)


def test_a_whole_models_checkpoint_is_refused_by_a_divided_one(ranks: Any, tmp_path: Path) -> None:
    for message in ranks(2, _from_one_checkpoint_to_two_parts, str(tmp_path)):
        assert (
            "tensor parallelism 1 and pipeline parallelism 1, this run has 2 and 1: use the same" in message
        )


def _aligned(stage: int, dtype: str) -> Any:
    accumulation = 8 // dist.get_world_size()
    engine, grid = _build(stage, dtype, gradient_accumulation_steps=accumulation, xtrain={"aligned": True})
    losses, norms = train(engine, grid.get_data_parallel_rank(), range(STEPS))
    return losses, norms, _weights(engine)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_aligned_mode_has_the_same_bits_for_every_split_of_the_batch(ranks: Any, dtype: str) -> None:
    """Slots are numbered by data-parallel rank: 1 x 4 and 2 x 2 (replicas x accumulation) with two parts each."""
    one = ranks(2, _aligned, 0, dtype)
    for stage in (0, 1, 2, 3):
        two = ranks(4, _aligned, stage, dtype)
        for rank, (_, norms, weights) in enumerate(two):
            assert norms == one[rank % 2][1]
            assert all(torch.equal(value, one[rank % 2][2][name]) for name, value in weights.items())


def _zero_init(sequence: bool) -> Any:
    grid = ProcessGrid(sequence=2) if sequence else ProcessGrid(tensor=2)
    given = _sequence_config(3, "fp32") if sequence else config(3, "fp32")
    with xtrain.zero.Init(config_dict_or_path=given, mpu=grid):
        model = ParallelMLP(None if sequence else grid.get_tensor_model_parallel_group())
    divided = next(param.numel() for name, param in model.named_parameters() if name.endswith("row"))
    engine = xtrain.initialize(model=model, config=given, mpu=grid)[0]
    if sequence:
        return divided, _train_sequences(engine, grid)[1]
    return divided, train(engine, grid.get_data_parallel_rank(), range(STEPS))[1]


@pytest.mark.parametrize("sequence", [False, True])
def test_models_built_divided_over_the_ranks_that_share_them(ranks: Any, sequence: bool) -> None:
    for divided, norms in ranks(4, _zero_init, sequence):
        assert divided == 0
        assert norms == pytest.approx(reference(STEPS)["norms"], rel=2e-5)


# ---------------------------------------------------------------- sequence parallelism


def _sequences(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """8 samples of 2 tokens."""
    x, y = samples(step)
    return x.view(-1, 2, FEATURES).float(), y.view(-1, 2, OUTPUTS).float()


def _train_sequences(engine: Any, grid: ProcessGrid) -> tuple[list[float], list[float]]:
    """A token of each sample on each sequence rank; the parts of a sample's loss add up to it."""
    losses, norms = [], []
    token, micro = grid.get_sequence_parallel_rank(), engine.train_micro_batch_size_per_gpu()
    dtype = next(engine.module.parameters()).dtype
    for step in range(STEPS):
        x, y = _sequences(step)
        first = grid.get_data_parallel_rank() * micro
        rows = slice(first, first + micro)
        loss = (engine(x[rows, token].to(dtype)).float() - y[rows, token]).square().mean() / 2
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms


def _sequence_config(stage: int, dtype: str) -> dict[str, Any]:
    return config(stage, dtype, train_batch_size=GLOBAL_BATCH // 2, gradient_accumulation_steps=1)


def _sequence_parallel(stage: int, dtype: str) -> Any:
    grid = ProcessGrid(sequence=2)
    engine = xtrain.initialize(model=ParallelMLP(), config=_sequence_config(stage, dtype), mpu=grid)[0]
    assert (engine.dp_world_size, engine.seq_dp_world_size, engine.train_micro_batch_size_per_gpu()) == (
        2,
        4,
        4,
    )
    losses, norms = _train_sequences(engine, grid)
    return losses, norms, _weights(engine)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_sequence_parallel_training_is_that_of_one_process(ranks: Any, stage: int, dtype: str) -> None:
    exact = reference(STEPS)
    loose = {"rel": 0.03, "abs": 0.02} if dtype == "bf16" else {"rel": 2e-5, "abs": 2e-6}
    results = ranks(4, _sequence_parallel, stage, dtype)
    means = [sum(losses) / 2 for losses in zip(*(result[0] for result in results), strict=True)]
    assert means == pytest.approx(exact["losses"], **loose)
    for _, norms, weights in results:
        assert norms == pytest.approx(exact["norms"], **loose)
        for name, value in weights.items():
            wanted = exact["weights"][name].flatten().tolist()
            assert value.flatten().tolist() == pytest.approx(wanted, **loose), name


# ---------------------------------------------------------------- pipelines


def _pipeline(record: str, stage: int) -> Any:
    grid = ProcessGrid(pipeline=2)
    last = grid.is_pipeline_last_stage()
    given = config(stage, "fp32", gradient_accumulation_steps=1, xtrain={"record": record})
    engine = xtrain.initialize(model=Half(int(last)), config=given, mpu=grid)[0]
    peer = dist.get_process_group_ranks(grid.get_pipeline_model_parallel_group())[0 if last else 1]
    micro, norms = engine.train_micro_batch_size_per_gpu(), []
    for step in range(STEPS):
        x, y = (tensor.float() for tensor in samples(step))
        first = grid.get_data_parallel_rank() * micro
        rows = slice(first, first + micro)
        if last:
            hidden = torch.empty(micro, 12).requires_grad_()
            dist.recv(hidden.data, peer)
            loss = (engine(hidden) - y[rows]).square().mean()
            engine.backward(loss)
            dist.send(hidden.grad, peer)
        else:
            hidden = engine(x[rows])
            dist.send(hidden.detach(), peer)
            grad = torch.empty_like(hidden)
            dist.recv(grad, peer)
            engine.backward((hidden * grad).sum())
        engine.step()
        norms.append(engine.get_global_grad_norm())
    folder = str(Path(record).parent)
    engine.save_checkpoint(folder)
    trained = _weights(engine)
    again = xtrain.initialize(model=Half(int(last)), config=given, mpu=grid)[0]
    again.load_checkpoint(folder)
    assert all(torch.equal(value, trained[name]) for name, value in _weights(again).items())
    assert again.global_steps == STEPS
    return norms, trained


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_scripts_own_pipeline_is_trained_as_one_model(ranks: Any, tmp_path: Path, stage: int) -> None:
    exact = reference(STEPS)
    for norms, weights in ranks(4, _pipeline, str(tmp_path / "r.jsonl"), stage):
        assert norms == pytest.approx(exact["norms"], rel=2e-5)
        for name, value in weights.items():
            wanted = exact["weights"][name].flatten().tolist()
            assert value.flatten().tolist() == pytest.approx(wanted, rel=2e-5, abs=2e-6), name
    recorded = read_record(tmp_path / "r.jsonl").losses()
    assert list(recorded.values()) == pytest.approx(exact["losses"], rel=2e-5)


# ---------------------------------------------------------------- mistakes


def _disagreement() -> str:
    """The second replica's second part has another shape: all four ranks must hear of it."""
    grid = ProcessGrid(tensor=2)
    model = nn.Linear(3, 5 if dist.get_rank() == 3 else 4)
    with pytest.raises(ConfigError) as error:
        xtrain.initialize(model=model, config=config(1, "fp32"), mpu=grid)
    return str(error.value)


def test_only_ranks_with_the_same_parameters_are_compared_and_all_fail(ranks: Any) -> None:
    for message in ranks(4, _disagreement):
        assert "disagree on a parameter: 'weight (4, 3) float32' and 'weight (5, 3) float32'" in message


def _unused() -> str:
    grid = ProcessGrid(tensor=2)
    model = ParallelMLP(grid.get_tensor_model_parallel_group())
    if grid.get_tensor_model_parallel_rank() == 1:
        model.spare = nn.Parameter(torch.zeros(2))
    given = config(1, "fp32")
    given["zero_optimization"]["ignore_unused_parameters"] = False
    engine = xtrain.initialize(model=model, config=given, mpu=grid)[0]
    with pytest.raises(ConfigError, match="parameters without a gradient") as error:
        train(engine, grid.get_data_parallel_rank(), range(1))
    return str(error.value)


def test_a_missing_gradient_in_one_part_of_the_model_fails_everywhere(ranks: Any) -> None:
    messages = ranks(4, _unused)
    assert "'spare' on every rank" in messages[1]
    assert "some of another model-parallel rank" in messages[0]


# ---------------------------------------------------------------- real DeepSpeed


def _both(stage: int, dtype: str, sequence: bool) -> Any:
    def build(module: Any, **more: Any) -> Any:
        grid = ProcessGrid(sequence=2) if sequence else ProcessGrid(tensor=2)
        model = ParallelMLP(None if sequence else grid.get_tensor_model_parallel_group())
        given = _sequence_config(stage, dtype) if sequence else config(stage, dtype)
        given.update(more)
        params = model.parameters()
        engine = module.initialize(model=model, model_parameters=params, config=given, mpu=grid)[0]
        if sequence:
            return _train_sequences(engine, grid)
        return train(engine, grid.get_data_parallel_rank(), range(STEPS))

    with live_deepspeed() as deepspeed:
        theirs = build(deepspeed)
    ours = build(xtrain)
    with fresh_deepspeed():
        assert build(xtrain, xtrain={"engine": "deepspeed"}) == theirs
    return ours, theirs


@pytest.mark.deepspeed
@pytest.mark.parametrize(("stage", "dtype", "sequence"), [
    (1, "fp32", False), (2, "bf16", False), (3, "fp32", False), (1, "fp32", True), (2, "fp32", True),
])  # fmt: skip
def test_real_deepspeed_with_the_same_mpu_trains_the_same(
    ranks: Any, stage: int, dtype: str, sequence: bool
) -> None:
    """Not in stage 3 with sequences, where DeepSpeed divides and reduces over get_data_parallel_group() alone."""
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    loose = {"rel": 0.02, "abs": 0.02} if dtype == "bf16" else {"rel": 2e-5}
    for ours, theirs in ranks(4, _both, stage, dtype, sequence):
        assert ours[0] == pytest.approx(theirs[0], **loose)
        assert ours[1] == pytest.approx(theirs[1], **loose)
