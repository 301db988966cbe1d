"""A load that fails has changed nothing, whatever is damaged: who catches the error trains on as before."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import xtrain
from tests import toys, training
from xtrain.base.errors import CheckpointError
from xtrain.checkpoint import contents
from xtrain.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

Ranks = Callable[..., list[Any]]


def _engine(stage: int) -> Any:
    torch.manual_seed(0)
    model = toys.WithState()
    settings = training.config(stage, bf16=stage == 2)
    return xtrain.initialize(model=model, model_parameters=training.param_groups(model), config=settings)[0]


def _everything(engine: Any) -> dict[str, Any]:
    """Copies of all that a load replaces."""
    optimizer, shards = engine.optimizer, [group.shard for group in engine.partition.sharded]
    return copy.deepcopy(
        {
            "parameters": [param.detach() for param in engine.module.parameters()],
            "shards": shards,
            "buffer": engine.module.scale,
            "extra": engine.module.notes,
            "masters": [master.detach() for master in optimizer.masters],
            "states": [optimizer.state[master] for master in optimizer.masters],
            "options": [
                {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
            ],
            "scale": vars(optimizer.loss_scaler),
            "schedule": engine.lr_scheduler.state_dict(),
            "counters": (
                engine.global_steps,
                engine.global_samples,
                engine.micro_steps,
                engine.skipped_steps,
            ),
            "random": torch.get_rng_state(),
        }
    )


def _equal(first: Any, second: Any) -> bool:
    if torch.is_tensor(first):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_equal, first, second))
    return bool(first == second)


def _reseal(directory: Path, *names: str, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """Change the manifest, and let it fit files that were changed."""
    path = directory / contents.MANIFEST
    manifest = json.loads(path.read_text())
    for name in names:
        content = (directory / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(manifest)
    path.write_text(json.dumps(manifest))


def _flip(directory: Path, name: str) -> None:
    data = bytearray((directory / name).read_bytes())
    data[-1] ^= 0x40
    (directory / name).write_bytes(data)


def _without_kind(manifest: dict[str, Any], kind: str) -> None:
    for name, runs in manifest["runs"].items():
        manifest["runs"][name] = [run for run in runs if run[1] != kind]


def _shifted(manifest: dict[str, Any]) -> None:
    run = manifest["runs"]["first.weight"][0]
    run[2] += 1


def _torch_file(directory: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    state = torch.load(directory / name, weights_only=True)
    change(state)
    torch.save(state, directory / name)
    _reseal(directory, name)


def _safetensors_file(directory: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(directory / name)
    change(tensors)
    save_file(tensors, directory / name)
    _reseal(directory, name)


def _cut_first(tensors: dict[str, Any]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name][:-1].clone()


OPTIMIZER, RNG = (contents.optimizer_file(1, 2), contents.optimizer_file(0, 2)), contents.rng_file(1, 2)
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "optimizer": (lambda d: _flip(d, OPTIMIZER[0]), "does not match its checksum"),
    "optimizer of another rank's making": (
        lambda d: _safetensors_file(d, OPTIMIZER[1], _cut_first),
        "the manifest says",
    ),
    "optimizer file of no tensors": (lambda d: _safetensors_file(d, OPTIMIZER[0], dict.clear), "does not hold"),
    "random state": (lambda d: _flip(d, RNG), "does not match its checksum"),
    "random state of another size": (
        lambda d: _torch_file(d, RNG, lambda s: s.update(torch=s["torch"][:-8].clone())),
        "'torch' is no random-number state",
    ),
    "random state of zeros": (
        lambda d: _torch_file(d, RNG, lambda s: s["device"].zero_()),
        "'device' is no random-number state",
    ),
    "counters": (lambda d: _torch_file(d, contents.STATE, lambda s: s.pop("global_steps")), "lacks global_steps"),
    "no optimizer section": (
        lambda d: _torch_file(d, contents.STATE, lambda s: s.pop("optimizer")),
        "has no optimizer states",
    ),
    "schedule": (
        lambda d: _torch_file(d, contents.STATE, lambda s: s["lr_scheduler"].clear()),
        "the scheduler does not take its state: KeyError",
    ),
    "extra state": (
        lambda d: _torch_file(d, contents.STATE, lambda s: s["module_extra"]["_extra_state"].clear()),
        "does not take its state: KeyError",
    ),
    "buffer": (
        lambda d: _safetensors_file(d, contents.MODEL, lambda t: t.update(scale=torch.ones(4))),
        "'scale' has shape [4]",
    ),
    "buffer that is not there": (
        lambda d: _safetensors_file(d, contents.MODEL, lambda t: t.pop("scale")),
        "lacks 'scale'",
    ),
    "manifest without runs": (
        lambda d: _reseal(d, change=lambda m: m["runs"].clear()),
        "/bad ",  # in stage 3 weights are missing, too
    ),
    "manifest without the optimizer's states": (
        lambda d: _reseal(d, change=lambda m: [_without_kind(m, k) for k in ("exp_avg", "exp_avg_sq")]),
        "among its optimizer states",
    ),
    "manifest without one kind of state": (
        lambda d: _reseal(d, change=lambda m: _without_kind(m, "exp_avg_sq")),
        "has no exp_avg_sq of",
    ),
    "manifest without the optimizer's files": (
        lambda d: _reseal(d, change=lambda m: [m["files"].pop(name) for name in OPTIMIZER]),
        "has no file optimizer-",
    ),
    "manifest with a shifted run": (lambda d: _reseal(d, change=_shifted), "in one piece"),
    "manifest without a checksum": (
        lambda d: _reseal(d, change=lambda m: m["files"][OPTIMIZER[0]].pop("sha256")),
        "is damaged: in manifest.json, the entry of file",
    ),
    "manifest of more ranks": (
        lambda d: _reseal(d, change=lambda m: m.update(ranks=3)),
        "there is no entry of file rng-00000-of-00003.pt",
    ),
    "manifest of words": (
        lambda d: _reseal(d, change=lambda m: m.update(runs={"first.weight": ["words"]})),
        "a run of parameter 'first.weight' is not one",
    ),
}  # fmt: skip


def _attempts(folder: str, stage: int) -> dict[str, tuple[str, bool]]:
    engine = _engine(stage)
    training.engine_step(engine, 0)
    engine.module.notes = ["as saved"]
    engine.save_checkpoint(folder, "good")
    engine.module.notes = ["as it was"]
    engine.module.scale.fill_(2)
    for step in (1, 2):
        training.engine_step(engine, step)
    torch.manual_seed(77)
    before, results = _everything(engine), {}
    for what, (damage, _) in DAMAGES.items():
        directory = Path(folder) / "bad"
        if engine.global_rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
            shutil.copytree(Path(folder) / "good", directory)
            damage(directory)
        xtrain.comm.barrier()
        with pytest.raises(CheckpointError) as caught:
            engine.load_checkpoint(folder, "bad")
        results[what] = str(caught.value), _equal(_everything(engine), before)
        xtrain.comm.barrier()
    training.engine_step(engine, 3)
    engine.load_checkpoint(folder, "good")
    results["good"] = str(engine.module.notes), engine.global_steps == 1
    return results


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_load_that_fails_has_changed_nothing(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    for results in ranks(2, _attempts, str(tmp_path), stage):
        assert results.pop("good") == ("['as saved']", True)
        for what, (said, unchanged) in results.items():
            assert DAMAGES[what][1] in said, what
            assert unchanged, what


def _nothing_in_common(folder: str, stage: int) -> str:
    other = nn.Sequential(nn.Linear(7, 33), nn.Linear(33, 5))
    xtrain.initialize(model=other, config=training.config(stage))[0].save_checkpoint(folder)
    engine = _engine(stage)
    with pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(folder, load_module_strict=False, load_module_only=True)
    return str(caught.value)


@pytest.mark.parametrize("stage", [0, 3])
def test_no_name_in_common_is_an_error_even_when_not_strict(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    for said in ranks(2, _nothing_in_common, str(tmp_path), stage):
        assert "have no name in common: it has '0.bias', '0.weight', '1.bias', ..., the model" in said


def _load_hook(folder: str) -> bool:
    class Renamed(nn.Module):
        """Reads what it was saved as when its layer had another name."""

        def __init__(self, old: bool) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            setattr(self, "old" if old else "new", nn.Linear(2, 2))
            if not old:
                self.register_load_state_dict_pre_hook(self._rename)

        @staticmethod
        def _rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
            for name in ("weight", "bias"):
                if f"{prefix}old.{name}" in state:
                    state[f"{prefix}new.{name}"] = state.pop(f"{prefix}old.{name}")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.norm(x)
            return y

    models = [Renamed(old=True), Renamed(old=False)]
    engines = [xtrain.initialize(model=model, config=training.config(0))[0] for model in models]
    engines[0].save_checkpoint(folder)
    engines[1].load_checkpoint(folder, load_optimizer_states=False)
    return torch.equal(models[0].old.weight, models[1].new.weight)


def test_modules_that_rename_what_they_load(ranks: Ranks, tmp_path: Path) -> None:
    assert all(ranks(2, _load_hook, str(tmp_path)))


def _untied(folder: str, stage: int) -> bool:
    tied, model = toys.Tied(), toys.Tied(tied=False)
    settings = training.config(stage)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    saved = xtrain.initialize(model=tied, config=settings)[0]
    saved.save_checkpoint(folder)
    engine = xtrain.initialize(model=model, config=settings)[0]
    engine.load_checkpoint(folder, load_module_only=True)
    first, both = saved.module_state_dict()["first.weight"], engine.module_state_dict()
    return torch.equal(both["first.weight"], first) and torch.equal(both["second.weight"], first)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_tied_weight_for_a_model_whose_weights_are_not_tied(
    ranks: Ranks, tmp_path: Path, stage: int
) -> None:
    assert all(ranks(2, _untied, str(tmp_path), stage))


def _wrapped(folder: str, before: int, after: int, bf16: bool) -> bool:
    """torch's wrapper for activation checkpointing gives its module another name, and hides that in `state_dict`."""
    engines = []
    for stage, half in ((before, bf16), (after, False)):
        model = training.build_model()
        model.first, model.second = checkpoint_wrapper(model.first), checkpoint_wrapper(model.second)
        settings = training.config(stage, bf16=half)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        engines.append(xtrain.initialize(model=model, config=settings)[0])
    training.engine_step(engines[0], 0)
    engines[0].save_checkpoint(folder)
    engines[1].load_checkpoint(folder)
    with xtrain.zero.GatheredParameters(engines[1].module):
        loaded = [param.detach().float().clone() for param in engines[1].module.parameters()]
    exported = get_fp32_state_dict_from_zero_checkpoint(folder)
    assert exported.keys() == engines[1].module.state_dict().keys()
    whole = xtrain.utils.safe_get_full_fp32_param
    return all(map(torch.equal, loaded, (whole(param) for param in engines[0].module.parameters())))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (3, 3), (1, 3), (3, 1)])
def test_wrapped_modules(ranks: Ranks, tmp_path: Path, before: int, after: int, bf16: bool) -> None:
    assert all(ranks(2, _wrapped, str(tmp_path), before, after, bf16))
