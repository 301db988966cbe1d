"""`import xtrain.as_deepspeed`: the import system, in this process, is put back after each test."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import xtrain
from xtrain.base.errors import BackendError, ConfigError
from xtrain.base.missing import API_VERSION, MissingModuleError, MissingNameError
from xtrain.checkpoint.utils import clone_tensors_for_torch_save
from xtrain.deepspeed_engine.accelerator import import_deepspeed
from xtrain.engine import hooks
from xtrain.shims import alias


@pytest.fixture
def fresh() -> Iterator[None]:
    """No deepspeed imported yet; what a test imports under that name is forgotten."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "deepspeed"}
    yield
    alias.uninstall()
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        del sys.modules[name]
    sys.modules.update(hidden)


def test_every_module_is_the_same_one_under_both_names(fresh: None) -> None:
    alias.install("deepspeed")
    alias.install("deepspeed")
    for name in (".ops.adam", ".runtime.zero.stage3", ".runtime.lr_schedules", ".utils", ".comm"):
        module = importlib.import_module(f"deepspeed{name}")
        assert module is importlib.import_module(f"xtrain{name}")
        assert module.__name__ == f"xtrain{name}"
        assert module.__spec__ is not None
        assert module.__spec__.name == f"xtrain{name}"
    assert importlib.reload(importlib.import_module("xtrain.runtime.lr_schedules"))


def test_the_installed_version_is_that_of_the_names(fresh: None) -> None:
    alias.install("deepspeed")
    record = json.loads(Path(__file__).with_name("deepspeed_names.json").read_text())
    assert importlib.metadata.version("deepspeed") == API_VERSION == record["version"]
    assert importlib.metadata.metadata("deepspeed")["Name"] == "deepspeed"
    assert importlib.metadata.version("torch") == torch.__version__


def test_the_package_has_deepspeeds_version_and_xtrains_names(fresh: None) -> None:
    alias.install("deepspeed")
    package = importlib.import_module("deepspeed")
    assert package.__version__ == package.version == API_VERSION
    assert package.initialize is xtrain.initialize
    assert package.zero is importlib.import_module("xtrain.zero")
    assert "initialize" in dir(package)
    with pytest.raises(MissingNameError, match="inference"):
        _ = package.InferenceEngine


def test_apexs_modules_are_the_shims(fresh: None) -> None:
    alias.install(*alias.APEX)
    for name, ours in alias.APEX.items():
        assert importlib.import_module(name) is importlib.import_module(ours)
    assert callable(importlib.import_module("apex_C").flatten)


def test_taken_back_the_names_are_free(fresh: None) -> None:
    alias.install("deepspeed")
    alias.uninstall()
    assert "deepspeed" not in sys.modules
    assert "xtrain" in sys.modules


def test_what_xtrain_lacks_is_explained_and_never_taken_from_the_real_package(fresh: None) -> None:
    alias.install("deepspeed")
    with pytest.raises(MissingModuleError, match="pipeline parallelism"):
        importlib.import_module("deepspeed.runtime.pipe.never")
    with pytest.raises(ModuleNotFoundError, match=r"xtrain has no module 'xtrain\.never_heard_of'"):
        importlib.import_module("deepspeed.never_heard_of")


def test_too_late_once_the_real_one_is_imported(fresh: None) -> None:
    sys.modules["deepspeed"] = ModuleType("deepspeed")
    with pytest.raises(ConfigError, match=r"imported already .* start the script by `xtrain run`"):
        alias.install("deepspeed")


def test_deepspeeds_engine_cannot_be_had_under_the_alias(fresh: None) -> None:
    alias.install("deepspeed")
    with pytest.raises(BackendError, match=r"hides the installed deepspeed"):
        import_deepspeed("cpu")


def test_modules_are_attributes_without_an_import_of_their_own() -> None:
    assert "WarmupLR" in xtrain.runtime.lr_schedules.VALID_LR_SCHEDULES
    assert xtrain.ops.adagrad.__name__ == "xtrain.ops.adagrad"
    assert not hasattr(xtrain.ops, "never")
    with pytest.raises(AttributeError, match=r"xtrain\.engine\.hooks' has no attribute 'never'"):
        _ = hooks.never  # type: ignore[attr-defined]


def test_clones_own_their_storage() -> None:
    flat = torch.arange(6.0)
    state = OrderedDict(weight=flat[2:4], nested=[(flat[:1], 3)], name="x")
    clone = clone_tensors_for_torch_save(state)
    assert isinstance(clone, OrderedDict)
    assert clone["weight"].untyped_storage().nbytes() == 8
    assert clone["weight"].equal(flat[2:4])
    assert clone["nested"][0][1] == 3
    assert isinstance(clone["nested"][0], tuple)


def test_constructors_in_zero_init_keep_their_dtype() -> None:
    """What Transformers replaces to keep DeepSpeed from rounding `torch.arange`."""
    module = xtrain.runtime.zero.partition_parameters
    wrapped = module.zero_wrapper_for_fp_tensor_constructor(module._orig_torch_arange, torch.bfloat16, None)
    assert wrapped(3.0).dtype == torch.float32
