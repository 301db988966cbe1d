"""A verdict for each use: from xtrain's sources, its tables of refused names, and its configuration model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

from xtrain.base import missing
from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.migrate import resolve, surface
from xtrain.migrate.configs import PART, line_of
from xtrain.migrate.cuda import cuda_verdict, environment_verdict, extension_verdict, library_verdict
from xtrain.migrate.use import Use
from xtrain.migrate.verdict import Answer, Finding, Verdict
from xtrain.shims import apex_table

ENGINE_CLASS = "xtrain.runtime.engine.XtrainEngine"
ACCELERATOR_CLASS = "xtrain.accelerator.Accelerator"

_OF_PIPELINES = {"train_batch", "eval_batch", "set_dataiterator", "set_batch_fn", "reset_activation_shape"}


@cache
def deepspeed_verdict(name: str) -> Answer:
    """About a dotted name that begins with `deepspeed`; with `xtrain`, what is there works as is."""
    package, _, path = name.partition(".")
    good = Verdict.AS_IS if package == "xtrain" else Verdict.SHIM
    if not path:
        return good, ""
    place = resolve.find(f"xtrain.{path}")
    if place.there and place.refused is None:
        return good, ""
    if place.there and place.refused:
        return Verdict.UNSUPPORTED, place.refused
    entry = missing.find(path)
    if entry is not None:
        used = "it can be imported, and refuses to be used: " if place.there else ""
        return Verdict.UNSUPPORTED, f"{entry.feature}: {used}{entry.instead}"
    return Verdict.UNSUPPORTED, "a name that xtrain does not know: docs/compat.md lists those that there are"


@cache
def _members(path: str) -> dict[str, str | None]:
    return resolve.members(path)


def _member(path: str, attribute: str) -> Answer | None:
    """About an attribute that the text of a class has; None for another."""
    members = _members(path)
    if attribute not in members:
        return None
    said = members[attribute]
    return (Verdict.AS_IS, "") if said is None else (Verdict.UNSUPPORTED, said)


def engine_verdict(name: str) -> Answer:
    """About `engine.X`; what the engine does not have is the module's, as in DeepSpeed."""
    attribute = name.split(".")[1]
    if (known := _member(ENGINE_CLASS, attribute)) is not None:
        return known
    path = "runtime.pipe.engine" if attribute in _OF_PIPELINES else f"engine.{attribute}"
    entry = missing.find(path) if attribute in _OF_PIPELINES | surface.ENGINE else None
    if entry is not None:
        return Verdict.UNSUPPORTED, f"{entry.feature}: {entry.instead}"
    return (
        Verdict.AS_IS,
        "" if attribute in surface.ENGINE else "the model's own name, which the engine hands on",
    )


def accelerator_verdict(name: str) -> Answer:
    """About `get_accelerator().X`."""
    no = "xtrain's accelerator has no such name: docs/compat.md lists those that there are"
    return _member(ACCELERATOR_CLASS, name.split(".")[1]) or (Verdict.UNSUPPORTED, no)


@cache
def apex_verdict(name: str) -> Answer:
    """About `apex...`, `amp_C...` and `apex_C...`."""
    root, _, path = name.partition(".")
    below = path if root == "apex" else name
    entry = apex_table.find(below) if below else None
    if entry is not None:
        return Verdict.UNSUPPORTED, f"{entry[0]}: {entry[1]}"
    if not below or resolve.find(f"xtrain.shims.apex.{below}").there:
        return Verdict.SHIM, "the same arithmetic in PyTorch"
    return Verdict.UNSUPPORTED, "a name that the shim of apex does not have: write it in PyTorch"


_LAUNCHERS = {
    "deepspeed": "put the commands of `xtrain shims DIR` first on the PATH, or write `xtrain deepspeed`",
    "ds_report": "put the commands of `xtrain shims DIR` first on the PATH, or call `xtrain doctor`",
    "deepspeed launcher": "put `xtrain run` before it, in python's place, or write `xtrain deepspeed`",
}
_OTHER_LAUNCHER = "start it by `xtrain run -m torch.distributed.run ...`, or `xtrain run -m` and its module"


def launch_verdict(name: str, line: str) -> Answer:
    """About a command line that starts training."""
    if name == "deepspeed" and re.search(r"\s--autotuning[\s=]+(run|tune)\b", line):
        return Verdict.UNSUPPORTED, "autotuning: set train_micro_batch_size_per_gpu by hand"
    return Verdict.SHIM, _LAUNCHERS.get(name, _OTHER_LAUNCHER)


def config_verdict(value: Any, is_part: bool = False) -> Answer:
    """About a DeepSpeed configuration: what `load_config` says of it; notices and warnings are told, too.

    Of a part, only what no other part can change counts: keys that are not known, and features that are not there.
    """
    from xtrain.config import load_config  # pydantic takes a while to import

    try:
        checked = load_config(value)
    except NotImplementedYetError as error:
        return Verdict.UNSUPPORTED, str(error).removeprefix("config: ")
    except ConfigError as error:
        text = str(error).removeprefix("config: ")
        if is_part and "unknown key" not in text:
            return Verdict.AS_IS, "the rest of it is known when the script runs"
        return Verdict.CHANGE, text
    return Verdict.AS_IS, "; ".join([*checked.warnings, *checked.notices])


def verdict_of(use: Use) -> Answer:
    """The verdict, without regard to whether the file could go on without."""
    if use.kind == "config":
        return config_verdict(use.value, use.name == PART)
    if use.kind == "launch":
        return launch_verdict(use.name, str(use.value))
    if use.kind == "unreadable":
        return Verdict.CHANGE, "it cannot be read, and was not looked into"
    verdicts: dict[str, Callable[[str], Answer]] = {
        "deepspeed": deepspeed_verdict,
        "engine": engine_verdict,
        "accelerator": accelerator_verdict,
        "apex": apex_verdict,
        "cuda": cuda_verdict,
        "environment": environment_verdict,
        "extension": extension_verdict,
        "library": library_verdict,
    }
    return verdicts[use.kind](use.name)


def _line_of_key(use: Use, text: str) -> int:
    """The line of the key that a text about a configuration quotes first, in its file."""
    quoted = re.search(r"'([\w.]+)'", text)
    return line_of(use.source, quoted.group(1).rpartition(".")[2]) if quoted else use.line


def judge(uses: Iterable[Use]) -> list[Finding]:
    """A finding for each use. What a file can do without, and is not there, works as is: it goes on without."""
    found = []
    for use in uses:
        verdict, text = verdict_of(use)
        if use.source and verdict in (Verdict.UNSUPPORTED, Verdict.CHANGE):
            use = replace(use, line=_line_of_key(use, text))
        if use.optional and verdict in (Verdict.UNSUPPORTED, Verdict.CHANGE):
            verdict, text = Verdict.AS_IS, f"the file goes on without it ({text})"
        found.append(Finding(use, verdict, text))
    return found
