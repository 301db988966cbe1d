"""Ranks that load alone, or different things: nobody waits for ever, and nobody trains on with two models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import xtrain
from tests import training
from xtrain.base.errors import CheckpointError, PeerLostError
from xtrain.checkpoint import loads as agreement
from xtrain.checkpoint import read
from xtrain.comm import RollCall

Ranks = Callable[..., list[Any]]
STAGES = [0, 1, 2, 3]


def _engine(stage: int = 1) -> Any:
    model = training.build_model()
    settings = training.config(stage)
    return xtrain.initialize(model=model, model_parameters=training.param_groups(model), config=settings)[0]


def _saved(folder: str, stage: int = 1) -> Any:
    """An engine after two steps, which were saved under the tags a and b."""
    engine = _engine(stage)
    for step, tag in enumerate("ab"):
        training.engine_step(engine, step)
        engine.save_checkpoint(folder, tag)
    return engine


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    before, agreement.PATIENCE = agreement.PATIENCE, seconds
    try:
        yield
    finally:
        agreement.PATIENCE = before


@contextmanager
def _in_turn(folder: str, rank: int) -> Iterator[None]:
    """Like a file lock: rank 1's turn comes when rank 0 is through."""
    mark = Path(folder) / ".rank-0-is-through"
    until = time.monotonic() + 50
    while rank == 1 and not mark.exists():
        assert time.monotonic() < until, "rank 0 waits for rank 1"
        time.sleep(0.01)
    try:
        yield
    finally:
        if rank == 0:
            mark.touch()


def _weights(engine: Any) -> list[torch.Tensor]:
    """This rank's own: masters of what it owns, and the parameters that are whole. No communication."""
    masters = [master.detach().clone() for master in engine.optimizer.masters]
    return masters + [param.detach().clone() for param in engine.module.parameters()]


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _step_error(engine: Any, own_backward: bool = False) -> tuple[str, bool]:
    """What training on raises, and whether the weights are what they were."""
    before = _weights(engine)
    x, y = training.samples(3)
    with pytest.raises(CheckpointError) as caught:  # noqa: PT012 - one or the other
        loss = training.loss_of(engine, x[:4], y[:4])
        if own_backward:
            loss.backward()
        else:
            engine.backward(loss)
        engine.step()
        loss = training.loss_of(engine, x[:4], y[:4])
        engine.backward(loss)
        engine.step()
    return str(caught.value), _same(before, _weights(engine))


# ---------------------------------------------------------------- all at once


def _different_tags(folder: str, stage: int) -> tuple[str, bool]:
    engine = _saved(folder, stage)
    before = _weights(engine)
    with pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(folder, "ab"[engine.global_rank])
    unchanged = _same(before, _weights(engine))
    training.engine_step(engine, 2)  # nothing has been loaded anywhere
    return str(caught.value), unchanged


@pytest.mark.parametrize("stage", [0, 3])
def test_different_tags_are_refused_before_anything_is_read(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    for said, unchanged in ranks(2, _different_tags, str(tmp_path), stage):
        assert "rank 0 found" in said
        assert f"{tmp_path}/b (manifest" in said
        assert unchanged


def _stale_latest(folder: str, empty: str) -> str:
    engine = _saved(folder)
    with pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(folder if engine.global_rank == 0 else empty)
    return str(caught.value)


def test_a_rank_whose_folder_is_empty(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks(2, _stale_latest, str(tmp_path / "run"), str(tmp_path / "empty")):
        assert "rank 1 found nothing" in said


def _damaged_on_one(folder: str) -> tuple[str, bool]:
    engine = _saved(folder)
    before = _weights(engine)
    with _failing(engine.global_rank == 1, "verify"), pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(folder, "a")
    return str(caught.value), _same(before, _weights(engine))


@contextmanager
def _failing(here: bool, name: str) -> Iterator[None]:
    def fails(*_: Any) -> Any:
        raise OSError("the disk is gone")

    real = getattr(read, name)
    if here:
        setattr(read, name, fails)
    try:
        yield
    finally:
        setattr(read, name, real)


def test_what_is_damaged_on_one_rank_is_loaded_by_none(ranks: Ranks, tmp_path: Path) -> None:
    for said, unchanged in ranks(2, _damaged_on_one, str(tmp_path)):
        assert "failed on rank 1: OSError: the disk is gone" in said
        assert unchanged


# ---------------------------------------------------------------- one after the other


def _one_after_the_other(folder: str, stage: int, alone: bool) -> list[float]:
    if not alone:
        _saved(folder, stage)
    engine = _engine(stage)
    for step in range(2):
        training.engine_step(engine, step + 5)  # so that there is something to replace
    if alone:
        with _patience(0.1), _in_turn(folder, engine.global_rank):
            assert engine.load_checkpoint(folder)[0] == f"{folder}/b"
    else:
        engine.load_checkpoint(folder)
    return [training.engine_step(engine, step) for step in range(2, 6)]


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_load_one_after_the_other(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    together = ranks(2, _one_after_the_other, str(tmp_path), stage, False)
    assert ranks(2, _one_after_the_other, str(tmp_path), stage, True) == together


def _in_another_dtype(folder: str, stage: int, alone: bool) -> dict[str, torch.Tensor]:
    """Saved in bf16, loaded in fp32: the weights are the masters, all of them, without asking other ranks."""
    model = training.build_model()
    if not alone:
        engine = xtrain.initialize(model=model, config=training.config(stage, bf16=True))[0]
        training.engine_step(engine, 0)
        engine.save_checkpoint(folder)
        whole = xtrain.utils.safe_get_full_fp32_param
        return {name: whole(param).clone() for name, param in engine.module.named_parameters()}
    engine = xtrain.initialize(model=model, config=training.config(stage))[0]
    with _patience(0.1), _in_turn(folder, engine.global_rank):
        engine.load_checkpoint(folder)
    return {name: value.clone() for name, value in engine.module_state_dict().items()}


@pytest.mark.parametrize("stage", STAGES)
def test_masters_of_other_ranks_are_read_from_their_files(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    masters = ranks(2, _in_another_dtype, str(tmp_path), stage, False)[0]
    for loaded in ranks(2, _in_another_dtype, str(tmp_path), stage, True):
        assert loaded.keys() == masters.keys()
        assert all(torch.equal(loaded[name], masters[name]) for name in masters)


def _different_one_after_the_other(folder: str, stage: int) -> Any:
    engine = _saved(folder, stage)
    rank, at_once = engine.global_rank, ""
    with _patience(0.1), _in_turn(folder, rank):
        try:
            engine.load_checkpoint(folder, "ab"[rank])
        except CheckpointError as error:
            at_once = str(error)
    with pytest.raises(CheckpointError, match="have not loaded the same"):
        engine.save_checkpoint(folder, "mixture")
    result = at_once, _step_error(engine), (Path(folder) / "mixture").exists()
    engine.load_checkpoint(folder, "a")
    training.engine_step(engine, 2)  # a complete checkpoint heals
    return result


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_load_different_tags_in_turn(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    first, second = ranks(2, _different_one_after_the_other, str(tmp_path), stage)
    assert first[0] == ""  # it could not know
    assert "rank 1 found" in second[0]
    assert "another rank has found" in second[0]
    for _, (said, unchanged), mixture in (first, second):
        assert "rank 0 loaded" in said
        assert "rank 1 loaded nothing" in said
        assert unchanged
        assert not mixture


def _failure_in_turn(folder: str) -> Any:
    engine = _saved(folder)
    rank = engine.global_rank
    with _patience(0.1), _in_turn(folder, rank), _failing(rank == 1, "verify"):
        try:
            engine.load_checkpoint(folder, "a")
        except CheckpointError as error:
            assert rank == 1
            assert "the disk is gone" in str(error)  # noqa: PT017 - on one rank only
    return _step_error(engine)


def test_a_failure_of_one_rank_is_found_out(ranks: Ranks, tmp_path: Path) -> None:
    for said, unchanged in ranks(2, _failure_in_turn, str(tmp_path)):
        assert "rank 1 loaded nothing" in said
        assert unchanged


def _only_the_first(folder: str, stage: int, own_backward: bool) -> tuple[str, bool]:
    _saved(folder, stage)
    engine = _engine(stage)
    if engine.global_rank == 0:
        with _patience(0.1):
            engine.load_checkpoint(folder)
    return _step_error(engine, own_backward)


@pytest.mark.parametrize("own_backward", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_only_the_first_rank_loads(ranks: Ranks, tmp_path: Path, stage: int, own_backward: bool) -> None:
    for said, unchanged in ranks(2, _only_the_first, str(tmp_path), stage, own_backward):
        assert f"rank 0 loaded {tmp_path}/b" in said
        assert "rank 1 loaded nothing" in said
        assert unchanged


def _parts_of_it(folder: str) -> str:
    engine = _saved(folder)
    with _patience(0.1), _in_turn(folder, engine.global_rank), pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement.Load, "compare", lambda *_: None)  # so that it is found out later
        engine.load_checkpoint(folder, load_optimizer_states=engine.global_rank == 0)
    return _step_error(engine)[0]


def test_ranks_that_load_different_parts(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks(2, _parts_of_it, str(tmp_path)):
        assert "without optimizer" in said


# ---------------------------------------------------------------- half way


def _half_way(folder: str, stage: int) -> Any:
    engine = _saved(folder, stage)
    with _failing(engine.global_rank == 1, "_load_states"), pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(folder, "a")
    said = _step_error(engine)
    with pytest.raises(CheckpointError, match="half way"):
        engine.save_checkpoint(folder, "mixture")
    engine.load_checkpoint(folder, "a")
    return str(caught.value), said, training.engine_step(engine, 1)


@pytest.mark.parametrize("world", [1, 2])
def test_who_catches_an_error_half_way_cannot_train_a_mixture(
    ranks: Ranks, tmp_path: Path, world: int
) -> None:
    if world == 1:
        assert "half way" in ranks(1, _half_way_alone, str(tmp_path))[0]
        return
    right = ranks(2, _right, str(tmp_path / "right"))[0]
    for raised, (said, unchanged), loss in ranks(2, _half_way, str(tmp_path), 1):
        assert "failed on rank 1: OSError: the disk is gone" in raised
        assert "failed half way" in said
        assert unchanged
        assert loss == right


def _right(folder: str) -> float:
    _saved(folder)
    engine = _engine()
    engine.load_checkpoint(folder, "a")
    return training.engine_step(engine, 1)


def _half_way_alone(folder: str) -> str:
    model = training.build_model()
    engine = xtrain.initialize(model=model, config=training.config(1, 16))[0]
    training.engine_step(engine, 0)
    engine.save_checkpoint(folder)
    with _failing(True, "_load_states"), pytest.raises(CheckpointError):
        engine.load_checkpoint(folder)
    x, y = training.samples(1)
    with pytest.raises(CheckpointError) as caught:
        engine.backward(training.loss_of(engine, x, y))
    return str(caught.value)


# ---------------------------------------------------------------- the roll call itself


def _roll_call(late: int) -> tuple[bool, bool, Any, str]:
    rank, world = xtrain.comm.get_rank(), xtrain.comm.get_world_size()
    call = RollCall("test", range(world))
    here = call.all_here("now", 30.0)
    if rank == late:
        time.sleep(1.0)
    waited = call.all_here("then", 0.2)
    different = call.compare("colours", "red" if rank else "blue", f"colour {min(rank, 1)}")
    same = call.compare("same", "red", "colour")
    assert same is None
    return here, waited, different, call.first("who", f"rank {rank}")


def test_a_roll_call_has_one_answer(ranks: Ranks) -> None:
    answers = ranks(4, _roll_call, 3)
    assert [answer[:3] for answer in answers] == [(True, False, {"colour 0": [0], "colour 1": [1, 2, 3]})] * 4
    assert len({answer[3] for answer in answers}) == 1


def _absent() -> str:
    call = RollCall("absent", range(2))
    call.timeout *= 0
    if xtrain.comm.get_rank() == 1:
        return ""
    with pytest.raises(PeerLostError) as caught:
        call.compare("a question", "mine", "mine")
    return str(caught.value)


def test_who_is_missing_is_said(ranks: Ranks) -> None:
    assert "a question cannot finish: nothing came from rank 1 within 0 s" in ranks(2, _absent)[0]
