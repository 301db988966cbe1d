"""Finds out what xtrain does with each name and key of DeepSpeed's record. Nothing here is a list by hand.

Names are imported as a script would, signatures compared, configuration keys given to `load_config`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch

import xtrain
from tests.deepspeed_api import record
from xtrain.base import missing
from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.config import load_config
from xtrain.config.load import _OLD_SPELLINGS
from xtrain.config.rules import NoEffect, NotYet, OnlyInStage3, Section
from xtrain.config.schema import Config, OptimizerConfig
from xtrain.optim import build_optimizer

_DIFFERS = "differs: in xtrain this is a"
IMPLEMENTED, DELEGATED = "implemented", "delegated to deepspeed"


@dataclass(frozen=True)
class Found:
    """One name or key: its path below `deepspeed`, whether xtrain has it, and what there is to say."""

    path: str
    available: bool
    status: str


def read_record() -> dict[str, Any]:
    """The committed record of DeepSpeed's names."""
    return json.loads(record.RECORD.read_text())  # type: ignore[no-any-return]


# ---------------------------------------------------------------- functions and classes


def _refused(message: str, path: str) -> str:
    """A message with what differs from name to name taken out, so that equal ones can share a row."""
    message = re.sub(r" \(/.*?\)$", "", message).replace("|", "/")
    for spelling in (path, path.rpartition(".")[2]):
        message, found = re.subn(rf"(?<![\w.]){re.escape(spelling)}(?!\w)", "NAME", message, count=1)
        if found:
            break
    return f"refused: {message}"


def _raises_not_yet(node: ast.AST) -> bool:
    return any(
        isinstance(inner, ast.Raise) and "NotImplementedYetError" in ast.unparse(inner)
        for inner in ast.walk(node)
    )


def _body(function: Any) -> list[ast.stmt]:
    """The statements of a function of xtrain, without its docstring; none for what is not Python."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return []
    if not tree.body or not isinstance(tree.body[0], ast.FunctionDef):
        return []
    statements = tree.body[0].body
    is_docstring = isinstance(statements[0], ast.Expr) and isinstance(statements[0].value, ast.Constant)
    return statements[1:] if is_docstring else statements


def _refused_arguments(function: Any, names: list[str]) -> list[str]:
    """Arguments for which the function raises NotImplementedYetError, in `if`s or by `refuse_options`."""
    nodes = [node for statement in _body(function) for node in ast.walk(statement)]
    tests = [
        ast.unparse(node.test)
        for node in nodes
        if isinstance(node, ast.If) and any(_raises_not_yet(inner) for inner in node.body)
    ]
    calls = (node for node in nodes if isinstance(node, ast.Call))
    tests += [ast.unparse(call) for call in calls if ast.unparse(call.func) == "refuse_options"]
    return [name for name in names if any(re.search(rf"\b{name}\b", test) for test in tests)]


def _always_refuses(function: Any) -> str | None:
    """The message of a function that does nothing but raise NotImplementedYetError."""
    body = _body(function)
    if len(body) != 1 or not isinstance(body[0], ast.Raise) or not _raises_not_yet(body[0]):
        return None
    wanted = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    try:
        function(*[p.name for p in wanted])
    except NotImplementedYetError as error:
        return str(error)
    raise AssertionError(f"{function} was expected to raise")


def _compare(described: str, value: Any, path: str) -> Found:
    """Compare an object of xtrain with the description of DeepSpeed's."""
    kind, _, listed = described.rstrip(")").partition("(")
    if kind == "module" or (kind == "value" and not inspect.ismodule(value)):
        return Found(path, True, IMPLEMENTED)
    if kind == "attribute":
        text = "implemented, but as a method" if inspect.ismethod(value) else IMPLEMENTED
        return Found(path, True, text)
    if not callable(value):
        return Found(path, False, f"{_DIFFERS} {type(value).__name__}")
    if (getattr(value, "__module__", None) or "").startswith("deepspeed"):
        return Found(path, True, DELEGATED)
    function = value.__init__ if inspect.isclass(value) else value
    message = _always_refuses(function)
    if message is not None:
        return Found(path, False, _refused(message, path))
    ours = record.parameters(record.undecorated(function))
    theirs = [name for name in listed.split(", ") if name and not name.startswith("*")]
    lacking = [name for name in theirs if name not in ours]
    if any(name.startswith("**") for name in ours):
        lacking = []
    notes = []
    if (getattr(function, "__module__", None) or "").startswith("torch.nn"):
        notes.append("but as torch.nn has it")
        lacking = []
    if len(lacking) > 7:
        notes.append("constructor arguments of its own")
    elif lacking:
        notes.append(f"without {', '.join(f'`{name}`' for name in lacking)}")
    refused = _refused_arguments(function, theirs)
    if refused:
        notes.append(f"refuses {', '.join(f'`{name}`' for name in refused)}")
    common = [name for name in theirs if name in ours]
    if len(lacking) <= 7 and common != [name for name in ours if name in theirs]:
        notes.append("arguments in another order")
    return Found(path, True, ", ".join([IMPLEMENTED, *notes]))


# ---------------------------------------------------------------- names of modules


def module(short: str, names: dict[str, str]) -> list[Found]:
    """What becomes of `from deepspeed.SHORT import NAME`."""
    where = "xtrain" if short == "deepspeed" else f"xtrain.{short}"
    found = []
    for name, described in names.items():
        path = name if short == "deepspeed" else f"{short}.{name}"
        space: dict[str, Any] = {}
        try:
            exec(f"from {where} import {name}", space)
        except ImportError as error:
            found.append(Found(path, False, _refused(str(error), path)))
        else:
            found.append(_compare(described, space[name], path))
    if not names:
        try:
            importlib.import_module(where)
        except ImportError as error:
            found.append(Found(short, False, _refused(str(error), short)))
        else:
            found.append(Found(short, True, IMPLEMENTED))
    return found


def members(heading: str, instance: Any, names: dict[str, str]) -> list[Found]:
    """What becomes of `instance.NAME`."""
    found = []
    for name, described in names.items():
        path = f"{heading}.{name}"
        try:
            value = getattr(instance, name)
        except AttributeError as error:
            found.append(Found(path, False, _refused(str(error), path)))
        else:
            found.append(_compare(described, value, path))
    return found


def engine() -> Any:
    """A small engine on this process."""
    built, *_ = xtrain.initialize(
        model=torch.nn.Linear(3, 2),
        training_data=torch.utils.data.TensorDataset(torch.zeros(2, 3)),
        config={
            "train_batch_size": 1,
            "optimizer": {"type": "AdamW", "params": {}},
            "scheduler": {"type": "WarmupLR", "params": {}},
            "zero_optimization": {"stage": 1},
            "log_level": "error",
        },
    )
    return built


# ---------------------------------------------------------------- configuration

_VALUES: tuple[Any, ...] = (
    True, False, 0, 1, 2, 3, 0.5, "bf16", "fp32", "x", ["x"], {}, {"enabled": True},
    {"device": "cpu"}, {"type": "AdamW"},
)  # fmt: skip
_NEEDED = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}


def _fields(path: str) -> Iterator[tuple[Any, Any]]:
    """(section, field) of the schema along a dotted key, as far as the schema goes."""
    model: Any = Config
    for part in path.split("."):
        infos = [info for name, info in model.model_fields.items() if part in (name, info.alias)]
        if not infos:
            return
        yield model, infos[0]
        candidates = [infos[0].annotation, *get_args(infos[0].annotation)]
        sections = [c for c in candidates if isinstance(c, type) and issubclass(c, Section)]
        if not sections:
            return
        model = sections[0]


def _choices(info: Any) -> list[Any]:
    """Values of a Literal."""
    outer = [info.annotation, *get_args(info.annotation)]
    return [value for kind in outer for value in get_args(kind) if isinstance(value, str)]


def _needed(first: str, fields: list[Any]) -> dict[str, Any]:
    """What a top-level section must hold for its other keys to be read at all."""
    marks = [mark for info in fields for mark in info.metadata]
    switches = [mark.switch for mark in marks if isinstance(mark, NotYet) and mark.switch]
    stage_3 = any(isinstance(mark, OnlyInStage3) for mark in marks)
    return {
        **_NEEDED.get(first, {}),
        **({"stage": 3} if first == "zero_optimization" and stage_3 else {}),
        **dict.fromkeys(switches, 2),
    }


def _config(path: str, value: Any, models: list[Any], fields: list[Any]) -> dict[str, Any]:
    """A configuration with `value` at `path`, and what the sections around it need to be read at all."""
    parts = path.split(".")
    section = value
    for depth in range(len(parts) - 1, -1, -1):
        on = depth < len(models) and "enabled" in models[depth].model_fields
        needed = _needed(parts[0], fields) if depth == 1 else {}
        section = {**needed, **({"enabled": True} if on else {}), parts[depth]: section}
    return section  # type: ignore[no-any-return]


def _unknown(path: str) -> str:
    """How `load_config` begins when it does not know this key (and not one of those in the value)."""
    section, _, key = path.rpartition(".")
    return f"config: unknown key {key!r}{f' in section {section!r}' if section else ''}:"


def config_key(written: str) -> Found:
    """What `load_config` does with a key, over many values for it."""
    first, dot, rest = written.partition(".")
    path = _OLD_SPELLINGS.get(first, first) + dot + rest
    models, fields = [model for model, _ in _fields(path)], [info for _, info in _fields(path)]
    marks = [mark for info in fields for mark in info.metadata if isinstance(mark, NotYet | NoEffect)]
    refused: dict[str, list[Any]] = {}
    notices: list[str] = []
    accepted = []
    switched_on = [{mark.switch: 2} for mark in marks if isinstance(mark, NotYet) and mark.switch]
    for value in [*_VALUES, *switched_on, *(_choices(fields[-1]) if fields else [])]:
        try:
            checked = load_config(_config(written, value, models, fields))
        except NotImplementedYetError as error:
            refused.setdefault(str(error).removeprefix("config: "), []).append(value)
        except ConfigError as error:
            if str(error).startswith(_unknown(written)):
                return Found(written, False, f"refused: {str(error).removeprefix('config: ')}")
        else:
            if any(repr(written) in warning for warning in checked.warnings):
                return Found(written, False, "ignored, with a warning")
            accepted.append(value)
            notices += checked.notices
    if any(isinstance(mark, NotYet) for mark in marks):
        if not refused:
            raise AssertionError(f"{path} is marked as not there yet, but no value was refused")
        return Found(written, False, f"refused: {next(iter(refused))}")
    if any(isinstance(mark, NoEffect) for mark in marks):
        return Found(written, True, f"no effect: {notices[0].partition(' has no effect: ')[2]}")
    if not accepted:
        raise AssertionError(f"no value was accepted for the implemented key {path}")
    but = [f"{json.dumps(values[0])} is refused: {text}" for text, values in refused.items()]
    return Found(written, True, "; ".join([IMPLEMENTED, *but]))


def _attempt(path: str, build: Callable[[], Any]) -> Found:
    try:
        build()
    except (NotImplementedYetError, ConfigError) as error:
        return Found(path, False, f"refused: {error}")
    return Found(path, True, IMPLEMENTED)


def optimizer_type(name: str) -> Found:
    """What becomes of `"optimizer": {"type": NAME}`."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}]
    return _attempt(name, lambda: build_optimizer(OptimizerConfig(type=name), groups, None))


# ---------------------------------------------------------------- everything


@dataclass(frozen=True)
class Everything:
    """All that was found, by where it stands in the record."""

    modules: dict[str, list[Found]]
    objects: dict[str, list[Found]]
    config: list[Found]
    optimizers: list[Found]

    def names(self) -> list[Found]:
        """All Python names."""
        return [item for table in (self.modules, self.objects) for found in table.values() for item in found]


def everything() -> Everything:
    """Probe the whole record. Needs a process that may start a process group of its own."""
    recorded = read_record()
    instances = {"engine": engine(), "accelerator": xtrain.get_accelerator()}
    return Everything(
        {short: module(short, names) for short, names in recorded["modules"].items()},
        {name: members(name, instances[name], names) for name, names in recorded["objects"].items()},
        [config_key(path) for path in recorded["config"]],
        [optimizer_type(name) for name in recorded["optimizers"]],
    )


def _import(path: str) -> Found:
    """What `from MODULE import NAME` does, or `import MODULE` where there is no name (a path that ends with a dot)."""
    module, _, name = path.rpartition(".")
    holder = f"xtrain.{module}" if module else "xtrain"
    try:
        exec(f"from {holder} import {name}" if name else f"import {holder}", {})
    except NotImplementedYetError as error:
        return Found(path, False, f"refused: {error}")
    except (ImportError, AttributeError) as error:
        return Found(path, False, f"bare: {type(error).__name__}: {error}")
    return Found(path, True, IMPLEMENTED)


def every_name() -> list[Found]:
    """Every module of DeepSpeed and every name at its top, private ones included; `bare` where no table explains it.

    The names of a module that is refused as a whole are left out: nobody gets as far as to ask for them.
    """
    found = []
    for module, names in read_record()["every"].items():
        short = "" if module == "deepspeed" else module
        whole = _import(f"{short}.") if short else Found("", True, IMPLEMENTED)
        found.append(Found(module, whole.available, whole.status))
        if whole.available:
            found += [_import(f"{short}.{name}" if short else name) for name in names.split()]
    return found


def unexplained(found: list[Found]) -> list[str]:
    """Refused names whose message does not say what to do instead.

    Modules that exist and are no packages are left out: there Python itself words the error of
    `from module import NAME`, and it names the module and the name.
    """
    return [
        item.path
        for item in found
        if not item.available
        and not item.status.startswith(_DIFFERS)
        and "is not there yet in xtrain: " not in item.status
        and not _plain(item.path)
    ]


def _plain(path: str) -> bool:
    holder = sys.modules.get(f"xtrain.{path.rpartition('.')[0]}")
    return holder is not None and not hasattr(holder, "__path__")


def stale(found: list[Found]) -> list[str]:
    """Patterns of the missing-table that no longer stand for anything that the table refuses."""
    features = [f"({entry.feature})" for entry in missing.MISSING]
    by_table = [item.path for item in found if any(feature in item.status for feature in features)]
    return [
        pattern
        for entry in missing.MISSING
        for pattern in entry.names
        if not any(missing.find(path) is entry and missing.covers(pattern, path) for path in by_table)
    ]
