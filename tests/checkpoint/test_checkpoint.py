"""Checkpoints: any number of ranks and stage, interrupted equals uninterrupted, complete or absent."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import xtrain
from tests import toys, training
from tests.zero.test_stage3 import engine_of, ids_of
from xtrain.base.errors import CheckpointError
from xtrain.checkpoint import contents, find_tag, is_checkpoint, write
from xtrain.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state


def _engine(stage: int, micro: int, bf16: bool) -> Any:
    model = training.build_model()
    settings = training.config(stage, micro, bf16)
    return xtrain.initialize(model=model, model_parameters=training.param_groups(model), config=settings)[0]


def _save(folder: str, stage: int, micro: int, bf16: bool) -> list[float]:
    """Train 4 steps, save, train 6 more; the six losses are the uninterrupted curve."""
    engine = _engine(stage, micro, bf16)
    for step in range(4):
        training.engine_step(engine, step)
    engine.save_checkpoint(folder, client_state={"step": 4, "note": ["a", {"b": torch.arange(3)}]})
    return [training.engine_step(engine, step) for step in range(4, 10)]


def _resume(folder: str, stage: int, micro: int, bf16: bool) -> tuple[list[float], Any, int, list[float]]:
    engine = _engine(stage, micro, bf16)
    with xtrain.zero.GatheredParameters(engine.module, modifier_rank=0):
        for param in engine.module.parameters():
            param.data.zero_()
    path, client = engine.load_checkpoint(folder)
    assert path == str(Path(folder) / "global_step4")
    rates = engine.get_lr()
    return [training.engine_step(engine, step) for step in range(4, 10)], client, engine.global_samples, rates


@pytest.mark.bits
@pytest.mark.parametrize("bf16", [False, True])
def test_resumed_equals_uninterrupted_to_the_bit(ranks: Any, tmp_path: Path, bf16: bool) -> None:
    for stage in (0, 1, 2, 3):
        folder = str(tmp_path / str(stage))
        uninterrupted = ranks(2, _save, folder, stage, 4, bf16)[0]
        resumed, client, samples, _ = ranks(2, _resume, folder, stage, 4, bf16)[0]
        assert resumed == uninterrupted
        assert client["step"] == 4
        assert client["note"][0] == "a"
        assert client["note"][1]["b"].tolist() == [0, 1, 2]
        assert samples == 10 * training.GLOBAL_BATCH


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 1), (1, 0)),
        ((2, 1), (4, 1)),
        ((4, 1), (2, 1)),
        ((1, 0), (4, 1)),
        ((4, 0), (1, 1)),
        ((2, 2), (4, 1)),
        ((4, 1), (2, 2)),
        ((2, 3), (4, 3)),
        ((4, 3), (1, 3)),
        ((2, 3), (2, 0)),
        ((4, 1), (2, 3)),
        ((1, 0), (4, 3)),
    ],
)
def test_any_number_of_ranks_and_stage(
    ranks: Any, tmp_path: Path, before: tuple[int, int], after: tuple[int, int], bf16: bool
) -> None:
    uninterrupted = ranks(before[0], _save, str(tmp_path), before[1], 4, bf16)[0]
    resumed, _, _, rates = ranks(after[0], _resume, str(tmp_path), after[1], 4, bf16)[0]
    assert resumed == pytest.approx(uninterrupted, rel=1e-2 if bf16 else 1e-5)
    assert rates[0] > 0


def test_files_are_readable_by_name(ranks: Any, tmp_path: Path) -> None:
    ranks(2, _save, str(tmp_path), 1, 4, True)
    directory = tmp_path / "global_step4"
    assert (tmp_path / "latest").read_text() == "global_step4"
    weights = load_file(directory / "model.safetensors")
    assert set(weights) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert weights["first.weight"].dtype == torch.bfloat16
    # Put the masters together from the ranks' files by their names alone.
    masters: dict[str, dict[int, torch.Tensor]] = {}
    for rank in range(2):
        for key, run in load_file(directory / contents.optimizer_file(rank, 2)).items():
            kind, name, start = key.split("|")
            if kind == "master":
                masters.setdefault(name, {})[int(start)] = run
    for name, weight in weights.items():
        whole = torch.cat([run for _, run in sorted(masters[name].items())])
        assert whole.dtype == torch.float32
        assert torch.equal(whole.view(weight.shape).bfloat16(), weight)
    assert not list(tmp_path.glob(".*"))


def _load_error(folder: str, tag: str | None = None, **changes: Any) -> str:
    model = training.build_model() if not changes.get("shape") else nn.Sequential(nn.Linear(7, 3))
    if changes.get("shape") == "same names":
        model = training.build_model()
        model.second = nn.Linear(33, 6)
    settings = training.config(1, 4)
    if changes.get("optimizer"):
        settings["optimizer"] = {"type": "SGD", "params": {"lr": 0.1}}
    groups = training.param_groups(model)
    engine, _, _, _ = xtrain.initialize(model=model, model_parameters=groups, config=settings)
    with pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(folder, tag)
    return str(caught.value)


def _damage(folder: Path, how: str) -> None:
    directory = folder / "global_step4"
    if how == "flip":
        path = directory / contents.optimizer_file(1, 2)
        data = bytearray(path.read_bytes())
        data[-1] ^= 0x40
        path.write_bytes(data)
    elif how == "truncate":
        path = directory / contents.MODEL
        path.write_bytes(path.read_bytes()[:-5])
    elif how == "missing file":
        (directory / contents.STATE).unlink()
    elif how == "no manifest":
        (directory / contents.MANIFEST).unlink()
    elif how == "bad manifest":
        (directory / contents.MANIFEST).write_text("{")
    elif how == "other version":
        manifest = json.loads((directory / contents.MANIFEST).read_text())
        (directory / contents.MANIFEST).write_text(json.dumps({**manifest, "version": 99}))
    elif how == "manifest without runs":
        manifest = json.loads((directory / contents.MANIFEST).read_text())
        del manifest["runs"]
        (directory / contents.MANIFEST).write_text(json.dumps(manifest))
    elif how == "rubbish in latest":
        (folder / "latest").write_bytes(b"\xff\xfe\x00rubbish")
    elif how == "a path in latest":
        (folder / "latest").write_text("../elsewhere")
    elif how == "nothing in latest":
        (folder / "latest").write_text("\n")
    elif how == "code":
        # A pickle that would run code when loaded carelessly.
        import os
        import pickle

        class Evil:
            def __reduce__(self) -> Any:
                return os.system, (f"touch {folder}/executed",)

        path = directory / contents.STATE
        path.write_bytes(pickle.dumps(Evil()))
        manifest = json.loads((directory / contents.MANIFEST).read_text())
        manifest["files"][contents.STATE] = {"bytes": path.stat().st_size, "sha256": contents.sha256(path)}
        (directory / contents.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("flip", "does not match its checksum"),
        ("truncate", "model.safetensors has"),
        ("missing file", "state.pt is missing"),
        ("no manifest", "not a complete checkpoint"),
        ("bad manifest", "cannot be read"),
        ("other version", "version 99"),
        ("manifest without runs", "lacks runs"),
        ("code", "cannot be read"),
        ("rubbish in latest", "latest cannot be read"),
        ("a path in latest", "pass tag='global_step4'"),
        ("nothing in latest", "does not hold the name of a checkpoint but ''"),
    ],
)
def test_damage_is_named_on_every_rank(ranks: Any, tmp_path: Path, how: str, said: str) -> None:
    ranks(2, _save, str(tmp_path), 1, 4, False)
    _damage(tmp_path, how)
    for message in ranks(2, _load_error, str(tmp_path)):
        assert said in message
    assert not (tmp_path / "executed").exists()


def _custom(folder: str, stage: int) -> tuple[str, bool]:
    model = training.build_model()
    engine = xtrain.initialize(model=model, config=training.config(stage))[0]
    engine.save_checkpoint(folder, "here")
    before = {name: value.clone() for name, value in engine.module_state_dict().items()}

    def fails_on_one(src: dict[str, Any], dst: nn.Module) -> None:
        if engine.grid.rank == 1:
            raise ValueError("not mine")

    def doubles(src: dict[str, Any], dst: nn.Module) -> None:
        with torch.no_grad():
            for name, param in dst.named_parameters():
                param.copy_(2 * src[name])

    with pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(folder, "here", custom_load_fn=fails_on_one)
    engine.load_checkpoint(folder, "here", load_optimizer_states=False, custom_load_fn=doubles)
    after = engine.module_state_dict()
    return str(caught.value), all(torch.equal(after[name], 2 * before[name]) for name in before)


@pytest.mark.parametrize("stage", [1, 3])
def test_custom_load_functions(ranks: Any, tmp_path: Path, stage: int) -> None:
    for said, doubled in ranks(2, _custom, str(tmp_path), stage):
        assert said == "custom_load_fn failed on rank 1: ValueError: not mine"
        assert doubled


def _mismatch(folder: str) -> list[str]:
    return [
        _load_error(folder, shape=True),
        _load_error(folder, shape="same names"),
        _load_error(folder, optimizer=True),
        _load_error(folder, tag="global_step9"),
    ]


def test_what_does_not_fit_is_named(ranks: Any, tmp_path: Path) -> None:
    ranks(2, _save, str(tmp_path), 1, 4, False)
    names, shapes, optimizer, tag = ranks(1, _mismatch, str(tmp_path))[0]
    assert "lacks '0.weight'" in names
    assert "'second.weight' has shape [5, 33], the model's has [6, 33]" in shapes
    assert "Adam, this run uses SGD" in optimizer
    assert "global_step4" in tag


def _fresh_start(folder: str) -> Any:
    return _engine(1, 4, False).load_checkpoint(folder)


def test_a_folder_without_checkpoints(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, _fresh_start, str(tmp_path / "none"))[0] == (None, None)
    (tmp_path / ".global_step1.tmp").mkdir()  # the first save was cut off
    assert ranks(2, _fresh_start, str(tmp_path))[0] == (None, None)
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    assert ranks(2, _fresh_start, str(tmp_path))[0] == (None, None)  # as in DeepSpeed
    with pytest.raises(CheckpointError, match="has no file 'latest'"):  # who asks for one to resume from
        find_tag(tmp_path, None)
    with pytest.raises(CheckpointError, match="is not a folder"):
        ranks(2, _fresh_start, str(tmp_path / "notes.txt"))
    with pytest.raises(CheckpointError, match="load_dir must be the path of a folder, got ''"):
        ranks(2, _fresh_start, "")
    assert not is_checkpoint(tmp_path)
    assert find_tag(tmp_path / "none", None) is None


def _disk_full(*_: Any) -> None:
    raise SafetensorError("I/O error: No space left on device")  # what safetensors raises: not an OSError


def _unwritable(folder: str) -> str:
    engine = _engine(1, 4, False)
    training.engine_step(engine, 0)
    engine.save_checkpoint(folder, "good")
    if xtrain.comm.get_rank() == 1:  # the disk of one rank fails
        write.save_file = _disk_full
    try:
        with pytest.raises(CheckpointError) as caught:
            engine.save_checkpoint(folder, "bad")
    finally:
        write.save_file = save_file
    return str(caught.value)


def test_a_failed_save_leaves_the_old_one_and_fails_everywhere(ranks: Any, tmp_path: Path) -> None:
    for message in ranks(2, _unwritable, str(tmp_path)):
        assert "failed on rank 1: SafetensorError: I/O error: No space left" in message
    assert (tmp_path / "latest").read_text() == "good"
    assert not (tmp_path / "bad").exists()
    assert contents.read_manifest(tmp_path / "good")["global_steps"] == 1


def _client_object(folder: str) -> str:
    engine = _engine(0, 4, False)
    with pytest.raises(CheckpointError) as caught:
        engine.save_checkpoint(folder, client_state={"model": engine.module})
    return str(caught.value)


def _client_values(folder: str) -> Any:
    engine = _engine(0, 4, False)
    state = {
        "loss": np.float64(0.5),
        "table": np.arange(3),
        "args": argparse.Namespace(lr=0.1),
        "when": {1: (2, None)},
    }
    engine.save_checkpoint(folder, client_state=state)
    with pytest.raises(CheckpointError) as caught:
        engine.save_checkpoint(folder, client_state={"f": (lambda: 0) if xtrain.comm.get_rank() == 0 else 1})
    return engine.load_checkpoint(folder)[1], str(caught.value)


def test_client_state_of_plain_values(ranks: Any, tmp_path: Path) -> None:
    for state, message in ranks(2, _client_values, str(tmp_path)):
        assert state["loss"] == 0.5
        assert state["table"].tolist() == [0, 1, 2]
        assert state["args"].lr == 0.1
        assert state["when"] == {1: (2, None)}
        assert "cannot be saved" in message


def _extra_state(folder: str) -> Any:
    first, second = toys.WithState(), toys.WithState()
    first.notes = [1, "two"]
    xtrain.initialize(model=first, config=training.config(1))[0].save_checkpoint(folder)
    xtrain.initialize(model=second, config=training.config(1))[0].load_checkpoint(folder)
    return second.notes


def test_a_modules_extra_state(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, _extra_state, str(tmp_path)) == [[1, "two"], [1, "two"]]


@pytest.mark.parametrize("left", [".global_step4.tmp", ".global_step4.old"])
def test_a_save_that_was_cut_off_while_replacing(ranks: Any, tmp_path: Path, left: str) -> None:
    uninterrupted = ranks(2, _save, str(tmp_path), 1, 4, False)[0]
    (tmp_path / "global_step4").rename(tmp_path / left)
    assert find_tag(tmp_path, None) == left
    assert ranks(2, _continue, str(tmp_path))[0] == uninterrupted


def _continue(folder: str) -> list[float]:
    engine = _engine(1, 4, False)
    engine.load_checkpoint(folder)
    return [training.engine_step(engine, step) for step in range(4, 10)]


def test_client_state_that_needs_code_is_refused_when_saving(ranks: Any, tmp_path: Path) -> None:
    assert "client_state" in ranks(1, _client_object, str(tmp_path))[0]
    assert not is_checkpoint(tmp_path)


def _overwrite_and_weights_only(folder: str) -> tuple[int, bool, bool]:
    engine = _engine(1, 4, True)
    training.engine_step(engine, 0)
    engine.save_checkpoint(folder, "same")
    training.engine_step(engine, 1)
    engine.save_checkpoint(folder, "same")
    weights = {name: value.clone() for name, value in engine.module.state_dict().items()}
    fresh = _engine(1, 4, True)
    for param in fresh.module.parameters():
        param.data.zero_()
    fresh.load_checkpoint(folder, "same", load_module_only=True)
    loaded = fresh.module.state_dict()
    same = all(torch.equal(loaded[name], weights[name]) for name in weights)
    master = fresh.optimizer.groups[0].masters[0]
    return fresh.global_steps, same, bool(master.abs().sum() > 0)


def test_overwriting_and_loading_weights_only(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, _overwrite_and_weights_only, str(tmp_path))[0] == (0, True, True)
    assert contents.read_manifest(tmp_path / "same")["global_steps"] == 2
    assert not list(tmp_path.glob(".*"))


def _dropout(folder: str, save: bool) -> list[float]:
    class Dropping(toys.TwoLayers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().forward(x), 0.3)

    torch.manual_seed(5 if save else 6)
    engine, _, _, _ = xtrain.initialize(model=Dropping(), config=training.config(1, 8))
    if save:
        training.engine_step(engine, 0)
        engine.save_checkpoint(folder)
    else:
        engine.load_checkpoint(folder)
    return [training.engine_step(engine, step) for step in range(1, 5)]


def test_random_states_continue(ranks: Any, tmp_path: Path) -> None:
    uninterrupted = ranks(2, _dropout, str(tmp_path), True)[0]
    assert ranks(2, _dropout, str(tmp_path), False)[0] == uninterrupted
    shutil.rmtree(tmp_path / "global_step1")


def _odd_engine(stage: int) -> Any:
    """Tied, frozen, unused and root-owned parameters; all divided in stage 3."""
    return engine_of(toys.LanguageModel("tied"), stage, bf16={"enabled": True}), engine_of(
        toys.LanguageModel("frozen"), stage
    )


def _save_odd(folder: str, stage: int) -> list[dict[str, torch.Tensor]]:
    states = []
    for name, engine in zip(("tied", "frozen"), _odd_engine(stage), strict=True):
        for step in range(2):
            engine.backward(engine(ids_of(0, step)))
            engine.step()
        engine.save_checkpoint(f"{folder}/{name}", exclude_frozen_parameters=name == "frozen")
        states.append({name: value.clone() for name, value in engine.module_state_dict().items()})
    return states


def _load_odd(folder: str, stage: int, weights_only: bool) -> list[dict[str, torch.Tensor]]:
    states = []
    for name, engine in zip(("tied", "frozen"), _odd_engine(stage), strict=True):
        engine.load_checkpoint(
            f"{folder}/{name}", load_module_strict=name == "tied", load_module_only=weights_only
        )
        states.append({name: value.clone() for name, value in engine.module_state_dict().items()})
        engine.backward(engine(ids_of(0, 5)))
        engine.step()
    return states


@pytest.mark.parametrize(("before", "after"), [((2, 3), (2, 3)), ((2, 3), (1, 1)), ((2, 2), (4, 3))])
def test_tied_and_frozen_weights_in_stage_3(
    ranks: Any, tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    saved = ranks(before[0], _save_odd, str(tmp_path), before[1])[0]
    for weights_only in (False, True):
        loaded = ranks(after[0], _load_odd, str(tmp_path), after[1], weights_only)[-1]
        for old, new in zip(saved, loaded, strict=True):
            assert old.keys() == new.keys()
            assert all(torch.equal(old[name], new[name]) for name in old)


def _state_dicts() -> bool:
    """load_module_state_dict of whole tensors in stage 3, strict and not."""
    engine = engine_of(toys.LanguageModel("tied"))
    state = {name: torch.full_like(value, 0.5) for name, value in engine.module_state_dict().items()}
    engine.load_module_state_dict(state)
    assert all(bool((value == 0.5).all()) for value in engine.module_state_dict().values())
    del state["embed.weight"], state["head.weight"]
    with pytest.raises(RuntimeError, match=r"embed\.weight"):
        engine.load_module_state_dict(state)
    engine.load_module_state_dict(state, strict=False)
    engine.load_module_state_dict({"module": state}, allowed_missing_keys=["embed.weight", "head.weight"])

    def fill(src: dict[str, Any], dst: torch.nn.Module) -> None:
        for name, param in dst.named_parameters():
            param.data.fill_(src["value"] + (name == "embed.weight"))

    engine.load_module_state_dict({"value": 2.0}, custom_load_fn=fill)
    prefixed = engine.module_state_dict(destination={"other": 1}, prefix="model.")
    assert prefixed.pop("other") == 1
    filled = {name: value.unique().tolist() for name, value in prefixed.items() if name.endswith("weight")}
    assert filled.pop("model.embed.weight") == filled.pop("model.head.weight") == [3.0]  # they are tied
    assert all(value == [2.0] for value in filled.values())
    state["embed.weight"] = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"size mismatch for embed\.weight"):
        engine.load_module_state_dict(state, strict=False)
    return True


def test_state_dicts_in_stage_3(ranks: Any) -> None:
    assert all(ranks(2, _state_dicts))


def _back_to_the_start(folder: str, stage: int) -> tuple[list[float], list[float]]:
    engine = _engine(stage, 4, bf16=False)
    engine.save_checkpoint(folder)
    first = [training.engine_step(engine, step) for step in range(4)]
    engine.load_checkpoint(folder)
    return first, [training.engine_step(engine, step) for step in range(4)]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_from_before_the_first_step_has_no_optimizer_states(
    ranks: Any, tmp_path: Path, stage: int
) -> None:
    first, again = ranks(2, _back_to_the_start, str(tmp_path), stage)[0]
    assert again == first


def _masters_after_loading(folder: str, stage: int, from_fp32: bool) -> list[tuple[bool, bool]]:
    """Of each parameter: (its master is what was saved, its master is its weight)."""
    settings = training.config(stage, 4, True)
    settings["zero_optimization"]["load_from_fp32_weights"] = from_fp32
    model = training.build_model()
    engine = xtrain.initialize(model=model, model_parameters=training.param_groups(model), config=settings)[0]
    for step in range(4):
        training.engine_step(engine, step)
    saved = [safe_get_full_fp32_param(param).clone() for param in engine.module.parameters()]
    states = [safe_get_full_optimizer_state(param, "exp_avg") for param in engine.module.parameters()]
    engine.save_checkpoint(folder)
    training.engine_step(engine, 4)
    engine.load_checkpoint(folder)
    found = []
    for param, master, state in zip(engine.module.parameters(), saved, states, strict=True):
        assert torch.equal(safe_get_full_optimizer_state(param, "exp_avg"), state)
        now = safe_get_full_fp32_param(param)
        found.append((torch.equal(now, master), torch.equal(now, master.bfloat16().float())))
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_masters_from_the_16_bit_weights(ranks: Any, tmp_path: Path, stage: int) -> None:
    """`load_from_fp32_weights`, which DeepSpeed reads in the ZeRO stages alone."""
    for from_fp32 in (True, False):
        found = ranks(2, _masters_after_loading, str(tmp_path / str(from_fp32)), stage, from_fp32)[0]
        exact, rounded = ([pair[i] for pair in found] for i in (0, 1))
        assert all(exact if from_fp32 or stage == 0 else rounded)
        assert not all(rounded if from_fp32 or stage == 0 else exact)
