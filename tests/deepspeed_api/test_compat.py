"""docs/compat.md is current, every DeepSpeed name that is refused says why, and nothing is refused that is there."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import xtrain
from tests.deepspeed_api import document, probe, record
from xtrain.base import missing
from xtrain.base.errors import NotImplementedYetError
from xtrain.base.missing import MissingModuleError, MissingNameError
from xtrain.optim import schedules

ROOT = Path(__file__).resolve().parents[2]


Probed = tuple[str, list[str], list[str], list[str]]
"""(the page, refused names that nothing explains, entries of the table that are no longer true, errors of Python's
own for names that DeepSpeed has)."""


def _probe() -> Probed:
    found, every = probe.everything().names(), probe.every_name()
    bare = [f"{item.path}: {item.status}" for item in every if item.status.startswith("bare")]
    return document.document(), probe.unexplained(found), probe.stale(found + every), bare


@pytest.fixture(scope="module")
def probed(request: pytest.FixtureRequest) -> Probed:
    """Found out in a worker: an engine is built, and the modules of xtrain are all imported."""
    from tests import pool

    return pool.pool(1).run(_probe)[0]


def test_the_page_is_current(probed: Probed) -> None:
    assert (ROOT / "docs" / "compat.md").read_text() == probed[0], "run `make docs`"


def test_every_refused_name_says_what_to_do(probed: Probed) -> None:
    assert not probed[1], "add them to xtrain/base/missing.py"


def test_no_entry_for_what_is_there(probed: Probed) -> None:
    assert not probed[2], (
        "these patterns in xtrain/base/missing.py stand for nothing that is refused: remove them"
    )


def test_every_name_of_every_module_resolves_or_is_refused(probed: Probed) -> None:
    assert not probed[3], "add them, or their module, to xtrain/base/missing.py"


def _ask_plain_modules() -> list[str]:
    """How a module without sub-modules refuses: a name that DeepSpeed has there, and one that nobody has."""
    messages = []
    for statement in (
        "from xtrain.runtime.config import get_fp16_enabled",
        "from xtrain.runtime.config import _private_of_deepspeed",
        "import xtrain.runtime.config; xtrain.runtime.config.get_fp16_enabled",
    ):
        with pytest.raises((MissingModuleError, MissingNameError)) as caught:
            exec(statement, {})
        messages.append(str(caught.value))
    return messages


def test_modules_without_submodules_refuse_by_feature_too(ranks: Callable[..., list[Any]]) -> None:
    (messages,) = ranks(1, _ask_plain_modules)
    assert all("is not there yet in xtrain: " in message for message in messages)
    assert messages[0].startswith("runtime.config.get_fp16_enabled (")


def test_what_explains_names_leaves_modules_as_they_are() -> None:
    from xtrain.runtime import config, lr_schedules
    from xtrain.utils import groups

    assert config.__path__ == []
    assert not hasattr(config, "no_such_name")
    assert importlib.reload(lr_schedules).WarmupLR is schedules.WarmupLR
    assert groups.mpu is None  # its class is its own
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("xtrain.engine.no_such_module")


@pytest.mark.deepspeed
def test_the_record_is_the_installed_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed = pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    recorded = probe.read_record()
    if deepspeed.__version__ != recorded["version"]:
        pytest.skip(f"recorded from deepspeed {recorded['version']}, installed is {deepspeed.__version__}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert json.loads(json.dumps(record.record())) == recorded


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("statement", "feature"),
    [
        ("import xtrain.runtime.pipe.never", "runtime.pipe.never (pipeline parallelism)"),
        ("from xtrain.runtime.pipe import DualPipe", "runtime.pipe.DualPipe (pipeline parallelism)"),
        ("from xtrain import DualPipeV", "DualPipeV (pipeline parallelism)"),
        ("import xtrain.moe.experts", "moe.experts (mixture of experts)"),
        ("import xtrain.inference.engine", "inference.engine (inference and generation)"),
        (
            "from xtrain.ops.op_builder import DeepCompileBuilder",
            "ops.op_builder.DeepCompileBuilder (compiled",
        ),
    ],
)
def test_an_import_that_fails_names_the_feature(statement: str, feature: str) -> None:
    with pytest.raises(ImportError, match="is not there yet in xtrain: ") as caught:
        exec(statement, {})
    assert isinstance(caught.value, MissingModuleError)
    assert str(caught.value).startswith(feature)


def test_attributes_that_are_missing_answer_hasattr() -> None:
    assert not hasattr(xtrain, "InferenceEngine")
    assert not hasattr(xtrain, "no_such_name")
    with pytest.raises(MissingNameError, match="DeepSpeedInferenceConfig"):
        xtrain.DeepSpeedInferenceConfig  # noqa: B018 - the access is the test
    with pytest.raises(AttributeError, match="neither has deepspeed"):
        xtrain.no_such_name  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("xtrain.no_such_module")


def _ask_engine() -> tuple[bool, str, str]:
    engine = probe.engine()
    messages = []
    for name in ("moe_layers", "no_such_name"):
        with pytest.raises(AttributeError) as caught:
            getattr(engine, name)
        messages.append(str(caught.value))
    return hasattr(engine, "moe_layers"), messages[0], messages[1]


def test_the_engine_names_the_feature_too(ranks: Callable[..., list[Any]]) -> None:
    ((there, known, unknown),) = ranks(1, _ask_engine)
    assert not there
    assert known.startswith("engine.moe_layers (mixture of experts) is not there yet in xtrain: ")
    assert "no_such_name" in unknown
    assert "not there yet" not in unknown


# ---------------------------------------------------------------- the tools see what they should see


def test_the_probe_compares_arguments() -> None:
    """Against functions written here: what is lacking, refused, or swapped must show."""

    def ours(tensor: Any, dst: int, group: Any = None) -> None:
        if group is not None:
            raise NotImplementedYetError("group", "leave it out")

    def refuses(tensor: Any) -> None:
        """Never works."""
        raise NotImplementedYetError("it", "do without")

    assert probe._compare("function(tensor, dst)", ours, "x.f") == probe.Found("x.f", True, "implemented")
    assert probe._compare("function(tensor, dst, tag)", ours, "x.f").status == "implemented, without `tag`"
    assert probe._compare("function(tensor, group)", ours, "x.f").status == "implemented, refuses `group`"
    assert "another order" in probe._compare("function(dst, tensor)", ours, "x.f").status
    assert probe._compare("function(tensor)", refuses, "x.f") == probe.Found(
        "x.f", False, "refused: it is not there yet in xtrain: do without"
    )
    assert not probe._compare("function(tensor)", 3, "x.f").available


def test_the_probe_reads_the_marks_of_config_keys() -> None:
    assert probe.config_key("zero_optimization.reduce_bucket_size").status == probe.IMPLEMENTED
    assert probe.config_key("zero_optimization.legacy_stage1").status.startswith("no effect: ")
    assert probe.config_key("bf16.bf16_optimizer_states").status.startswith("refused: config key ")
    assert probe.config_key("no_such_key") == probe.Found("no_such_key", False, "ignored, with a warning")
    assert probe.config_key("bf16.no_such_key").status.startswith(
        "refused: unknown key 'no_such_key' in section"
    )


def test_stale_entries_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (missing.Missing("a", "b", ("pipe", "comm.all_reduce")), missing.Missing("c", "d", ("pipe.*",)))
    monkeypatch.setattr(missing, "MISSING", table)
    found = [probe.Found("pipe.Module", False, "refused: (a) ..."), probe.Found("comm.all_reduce", True, "")]
    assert probe.stale(found) == ["comm.all_reduce", "pipe.*"]


# ---------------------------------------------------------------- import paths


def test_deepspeeds_import_paths_lead_to_the_same_objects() -> None:
    from xtrain.accelerator import DeepSpeedAccelerator, get_accelerator
    from xtrain.runtime.dataloader import RepeatingLoader
    from xtrain.runtime.engine import DeepSpeedEngine
    from xtrain.runtime.lr_schedules import WarmupLR
    from xtrain.runtime.zero import optimizer
    from xtrain.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert DeepSpeedEngine is xtrain.DeepSpeedEngine
    assert RepeatingLoader is xtrain.RepeatingLoader
    assert WarmupLR is schedules.WarmupLR
    assert issubclass(DeepSpeedZeroOptimizer, optimizer.ZeroOptimizer)
    assert get_accelerator() is xtrain.get_accelerator()
    assert isinstance(get_accelerator(), DeepSpeedAccelerator)
    assert issubclass(DeepSpeedZeroOptimizer, torch.optim.Optimizer)
