"""Records the public names and configuration keys of the installed DeepSpeed in deepspeed_names.json.

    python -m tests.deepspeed_api.record [--check]      # needs deepspeed

The record is committed, so that docs/compat.md can be made where DeepSpeed is not installed. Nothing in
it is written by hand: names and argument names come from the imported modules, configuration keys from
watching which keys DeepSpeedConfig asks its dictionary for.
"""

from __future__ import annotations

import ast
import collections.abc
import importlib
import inspect
import json
import logging
import os
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from xtrain.base.files import write_text

RECORD = Path(__file__).with_name("deepspeed_names.json")
REMOVED = "removed"
"""Marks a configuration key that DeepSpeed itself refuses by name."""

MODULES = [
    "deepspeed", "accelerator", "autotuning", "checkpoint", "checkpointing", "comm", "compile",
    "inference", "inference.config", "io", "launcher.launch",
    "launcher.multinode_runner", "launcher.runner", "linear", "module_inject", "moe", "moe.layer",
    "moe.sharded_moe", "moe.utils", "monitor", "monitor.config", "monitor.monitor", "nvme", "ops",
    "ops.adagrad", "ops.adam", "ops.aio", "ops.lamb", "ops.lion", "ops.op_builder", "ops.random_ltd",
    "ops.transformer", "pipe", "profiling", "profiling.config", "profiling.flops_profiler", "runtime",
    "runtime.activation_checkpointing.checkpointing", "runtime.base_optimizer", "runtime.bf16_optimizer",
    "runtime.checkpoint_engine", "runtime.compiler", "runtime.config", "runtime.config_utils",
    "runtime.data_pipeline", "runtime.data_pipeline.curriculum_scheduler",
    "runtime.data_pipeline.data_sampling.data_sampler", "runtime.dataloader", "runtime.engine",
    "runtime.fp16.fused_optimizer", "runtime.fp16.loss_scaler", "runtime.fp16.unfused_optimizer",
    "runtime.hybrid_engine", "runtime.lr_schedules", "runtime.pipe", "runtime.pipe.engine",
    "runtime.pipe.module", "runtime.pipe.schedule", "runtime.pipe.topology",
    "runtime.sequence_parallel.ulysses_sp", "runtime.state_dict_factory", "runtime.swap_tensor",
    "runtime.tensor_parallel", "runtime.utils", "runtime.zenflow", "runtime.zero", "runtime.zero.config",
    "runtime.zero.offload_config", "runtime.zero.partition_parameters", "runtime.zero.stage3",
    "runtime.zero.stage_1_and_2", "runtime.zero.tiling", "runtime.zero.utils", "sequence",
    "sequence.cross_entropy", "sequence.fpdt_layer", "sequence.layer", "utils", "utils.groups",
    "utils.logging", "utils.numa", "utils.tensor_fragment", "utils.timer", "utils.z3_leaf_module",
    "utils.zero_to_fp32", "zero",
]  # fmt: skip
"""Modules that scripts import, without the leading `deepspeed.`."""

OBJECTS = {
    # heading: (module, class); their public methods, properties and attributes are recorded.
    "engine": ("runtime.engine", "DeepSpeedEngine"),
    "accelerator": ("accelerator.abstract_accelerator", "DeepSpeedAccelerator"),
}


def parameters(function: Any) -> list[str]:
    """Parameter names without `self`; `*` and `**` stay in front of variadic ones."""
    try:
        found = [(p.kind, p.name) for p in inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):
        return []
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [marks.get(kind, "") + name for kind, name in found if name != "self"]


def undecorated(function: Any) -> Any:
    """The innermost function behind decorators, also those that do not set `__wrapped__`."""
    while True:
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        inner = [value for value in cells if inspect.isfunction(value)]
        if parameters(function) != ["*args", "**kwargs"] or len(inner) != 1:
            return function
        function = inner[0]


def _describe(value: Any) -> str:
    """For example `function(tensor, group)`, `module`, `value`."""
    if inspect.ismodule(value):
        return "module"
    if inspect.isclass(value):
        return f"class({', '.join(parameters(value.__init__))})"
    if callable(value):
        return f"function({', '.join(parameters(undecorated(value)))})"
    return "value"


def _is_deepspeeds(name: str, value: Any, module: types.ModuleType) -> bool:
    """Whether a name is offered by the module, and not merely something that it imported."""
    if name.startswith("_"):
        return False
    package = hasattr(module, "__path__")
    if inspect.ismodule(value):
        return module.__name__ == "deepspeed" and value.__name__.startswith("deepspeed")
    home = getattr(value, "__module__", None)
    if home is None or not callable(value):  # constants count at the top only: there are hundreds elsewhere
        return module.__name__ == "deepspeed" and isinstance(value, str | int | bool)
    return home.startswith("deepspeed") if package else home == module.__name__


def names() -> dict[str, dict[str, str]]:
    """module -> name -> kind and parameters."""
    found: dict[str, dict[str, str]] = {}
    for short in MODULES:
        module = importlib.import_module(_real(short))
        found[short] = {
            name: _describe(value)
            for name, value in sorted(vars(module).items())
            if _is_deepspeeds(name, value, module)
        }
    return found


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """Names that a module's own statements bind: definitions, assignments, and what it imports of DeepSpeed."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for name in targets if isinstance(name, ast.Name))
        elif isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith("deepspeed")):
            yield from (alias.asname or alias.name for alias in node.names if alias.name != "*")
        elif isinstance(node, ast.If | ast.Try | ast.With):
            inner = [node.body, getattr(node, "orelse", []), *(h.body for h in getattr(node, "handlers", []))]
            yield from _bound([statement for part in inner for statement in part])


def every_name() -> dict[str, str]:
    """module -> names at its top, public and private, with spaces between; of all modules, also internal ones.

    From the sources: many modules can only be imported where a compiler, CUDA or another package is.
    """
    import deepspeed

    root = Path(str(deepspeed.__file__)).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        short = ".".join(part for part in parts if part != "__init__") or "deepspeed"
        if short != "deepspeed" or path.name == "__init__.py":
            names = sorted(set(_bound(ast.parse(path.read_text()).body)))
            found[short] = " ".join(name for name in names if not name.startswith("__"))
    return found


def _real(short: str) -> str:
    """The importable path of a module; two are attributes of `deepspeed` with a longer path."""
    if short == "deepspeed":
        return short
    longer = {"zero": "runtime.zero", "checkpointing": "runtime.activation_checkpointing.checkpointing"}
    return f"deepspeed.{longer.get(short, short)}"


def _assigned_attributes(cls: type) -> set[str]:
    """Names that a class's own methods assign on `self`."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
        ):
            found |= {node.attr} if node.value.id == "self" else set()
    return found


def members(module: str, name: str) -> dict[str, str]:
    """Public methods, properties and attributes of a class of DeepSpeed."""
    cls = getattr(importlib.import_module(f"deepspeed.{module}"), name)
    found = dict.fromkeys(_assigned_attributes(cls), "attribute")
    for attribute, value in vars(cls).items():
        method = callable(getattr(cls, attribute))
        found[attribute] = f"method({', '.join(parameters(undecorated(value)))})" if method else "attribute"
    return {key: found[key] for key in sorted(found) if not key.startswith("_")}


class Watched(dict):  # type: ignore[type-arg]
    """A configuration section that writes down which keys are asked of it."""

    def __init__(self, values: dict[str, Any], path: str, asked: set[str]) -> None:
        super().__init__(values)
        self.path, self.asked = path, asked

    def __copy__(self) -> Watched:
        return self

    def _ask(self, key: Any) -> str:
        path = f"{self.path}.{key}" if self.path else str(key)
        self.asked.add(path)
        return path

    def __contains__(self, key: Any) -> bool:
        self._ask(key)
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        self._ask(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        path = self._ask(key)
        value = super().get(key, default)
        return Watched(value, path, self.asked) if type(value) is dict else value

    def keys(self) -> Any:
        return collections.abc.KeysView(self)


def _build(path: str, section: dict[str, Any]) -> tuple[set[str], Exception | None]:
    """The keys asked for by a DeepSpeedConfig with `section` at `path`, and what it raised."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()
    parts = path.split(".") if path else []
    value: Any = Watched(section, path, asked)
    for depth in range(len(parts) - 1, -1, -1):
        value = Watched({"enabled": True, parts[depth]: value}, ".".join(parts[:depth]), asked)
    dict.setdefault(value, "train_batch_size", 1)
    dict.pop(value, "enabled", None)
    try:
        DeepSpeedConfig(value)
    except Exception as error:  # any: a section where a number is expected fails in many ways
        return asked, error
    return asked, None


def _inner_models(info: Any) -> list[Any]:
    from pydantic import BaseModel

    candidates = (info.annotation, *get_args(info.annotation))
    return [inner for inner in candidates if isinstance(inner, type) and issubclass(inner, BaseModel)]


def _model_keys(model: Any, path: str) -> Iterator[str]:
    """Dotted keys of a pydantic model; an alias is what users write."""
    for name, info in model.model_fields.items():
        key = f"{path}.{info.alias or name}"
        yield key
        for inner in _inner_models(info):
            yield from _model_keys(inner, key)


def _models(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _models(sub)


def config_keys() -> dict[str, str]:
    """Dotted key -> "" or REMOVED."""
    from deepspeed.runtime import config as reading
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel
    from pydantic import ValidationError

    keys: set[str] = set()
    modelled: dict[str, type] = {}
    new, _ = _build("", {})
    while new:
        keys |= new
        found: set[str] = set()
        for path in sorted(new):
            _, error = _build(path, {"not_a_key": 1})
            if isinstance(error, ValidationError):
                model: Any = next(m for m in _models(DeepSpeedConfigModel) if m.__name__ == error.title)
                for part in error.errors()[0]["loc"][:-1]:  # one model may cover several sections
                    model = (_inner_models(model.model_fields[part]) or [None])[0] if model else None
                modelled |= {path: model} if model else {}
            for section in ({}, {"enabled": True}, {"type": "Adam"}):
                found |= {key for key in _build(path, section)[0] if not key.endswith("not_a_key")}
        new = found - keys
    for path, model in modelled.items():
        keys |= set(_model_keys(model, path))
    removed = {
        *reading._REMOVED_TOP_LEVEL_CONFIG_KEYS,
        *(f"zero_optimization.{key}" for key in reading._REMOVED_ZERO_CONFIG_KEYS),
    }
    return {key: REMOVED if key in removed else "" for key in sorted(keys | removed)}


def record() -> dict[str, Any]:
    """Everything, as committed: kinds are `module`, `class(...)`, `function(...)`, `method(...)`, `attribute`
    and `value`."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    modules = names()
    return {
        "version": deepspeed.__version__,
        "modules": modules,
        "every": every_name(),
        "objects": {heading: members(*where) for heading, where in OBJECTS.items()},
        "options": _options(),
        "config": config_keys(),
        "optimizers": sorted(DEEPSPEED_OPTIMIZERS),
    }


def _options() -> list[str]:
    """The options that add_config_arguments adds to a parser."""
    import argparse

    import deepspeed

    parser = deepspeed.add_config_arguments(argparse.ArgumentParser(add_help=False))
    return [option for action in parser._actions for option in action.option_strings]


def main() -> int:
    """Write the record, or with --check say whether it is current."""
    text = json.dumps(record(), indent=1) + "\n"
    if "--check" not in sys.argv[1:]:
        write_text(RECORD, text)
    elif RECORD.read_text() != text:
        print(
            f"{RECORD.name} is not what the installed DeepSpeed has: run make parity RECORD=1",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
