"""Whether a checkpoint fits the engine and can be read, asked before anything of the engine changes.

What cannot be asked but by trying (the script's own scheduler, a module's extra state) is tried and taken back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xtrain.base.errors import CheckpointError
from xtrain.base.log import log_dist
from xtrain.checkpoint import contents
from xtrain.checkpoint.fragments import Fragments, Weights
from xtrain.checkpoint.optimizer_states import others_of_masters
from xtrain.checkpoint.safe import safe_load
from xtrain.zero import names
from xtrain.zero.buffers import is_dense
from xtrain.zero.flat import FlatGroup
from xtrain.zero.home import full_shape, home_of
from xtrain.zero.train_state import TrainState
from xtrain.zero.weights import sharded_parameters


@dataclass(frozen=True)
class Wanted:
    """What a script wants of a checkpoint, beside the weights.

    Attributes:
        strict: names must be the same.
        optimizer, scheduler: their states.
        counters: steps and random numbers.
        custom: the script fills the module itself.
    """

    strict: bool
    optimizer: bool
    scheduler: bool
    counters: bool
    custom: bool

    @property
    def parts(self) -> set[str]:
        """What of the engine is replaced."""
        named = {"optimizer": self.optimizer, "scheduler": self.scheduler, "counters": self.counters}
        return {"module", *(name for name, wanted in named.items() if wanted)}

    @property
    def complete(self) -> bool:
        """Whether nothing of what the engine had is left."""
        return self.strict and not self.custom and len(self.parts) == 4

    def describe(self) -> str:
        """What is left out, in words; what the ranks compare."""
        left = sorted({"optimizer", "scheduler", "counters"} - self.parts)
        return (f" without {', '.join(left)}" if left else "") + (
            " by a custom_load_fn" if self.custom else ""
        )


@dataclass
class Staged:
    """A checkpoint that was found good: all that is needed to load it, large tensors still on disk.

    Attributes:
        tensors: what `module.load_state_dict` is given: whole tensors by name, and extra states.
        pieces: names of the weights of which this rank has a part only.
        states: of the state file.
        runs: masters and optimizer states; kinds of states of each flat group in `kinds`, what is not cut into runs in
            `others`, for each of its masters.
        rng: this rank's random-number states; None: they are not restored.
    """

    directory: Path
    weights: Weights
    runs: Fragments
    states: dict[str, Any]
    tensors: dict[str, Any]
    pieces: list[str]
    kinds: list[list[str]] = field(default_factory=list)
    others: list[list[dict[str, Any]]] = field(default_factory=list)
    rng: dict[str, Any] | None = None


def verify(train_state: TrainState, directory: Path, wanted: Wanted) -> Staged:
    """Read and check all that loading will need; change nothing.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit the engine.
    """
    model = train_state.grid.model
    manifest = contents.select_part(
        contents.read_manifest(directory), directory, model.rank, model.tensor, model.pipeline
    )
    states = _read_states(directory, manifest)
    runs = Fragments(directory, manifest)
    masters = _masters_wanted(train_state, manifest, wanted)
    weights = Weights(runs, masters)
    sharded = {} if wanted.custom else sharded_parameters(train_state.module)
    tensors = {
        **_whole_tensors(train_state.module, weights, sharded, masters),
        **states.get("module_extra", {}),
    }
    # A tied weight once, whatever its names.
    pieces = {(sharded[name].group, sharded[name].member): name for name in weights.names & sharded.keys()}
    staged = Staged(directory, weights, runs, states, tensors, sorted(pieces.values()))
    _check_shapes(train_state, manifest, directory)
    if not wanted.custom:
        _check_module(train_state, staged, wanted.strict)
        for name in staged.pieces:
            weights.check_piece(name, sharded[name].group, sharded[name].member)
        _try_extra_states(train_state.module, staged)
    if train_state.optimizer is not None and wanted.optimizer:
        _check_optimizer(train_state, staged)
    if train_state.lr_scheduler is not None and wanted.scheduler and "lr_scheduler" in states:
        _try_scheduler(train_state, staged)
    if wanted.counters:
        staged.rng = _read_rng(train_state, directory, manifest)
    return staged


def _whole_tensors(
    module: nn.Module, weights: Weights, sharded: Collection[str], masters: Callable[[str], bool]
) -> dict[str, torch.Tensor]:
    """The weights and buffers that are not divided here, under the names of the module's `state_dict`."""
    elsewhere = {weights.renamed.get(name, name) for name in sharded}
    own_names = weights.names - set(sharded) - elsewhere - weights.aliases.keys() - weights.renamed.keys()
    tensors = {name: weights.whole(name) for name in own_names}
    for own, given in weights.renamed.items():
        better = given not in weights.names or (masters(own) and weights.has_master(own))
        if own not in sharded and own in weights.names and better:
            tensors[given] = weights.whole(own)
    # Further names only where the model has them, too: it may be tied no longer.
    for alias in weights.aliases.keys() & names.state_dict(module).keys() - set(sharded):
        name = weights.aliases[alias]
        tensors[alias] = tensors[name] if name in tensors else weights.whole(name)
    return tensors


def read_torch(directory: Path, manifest: dict[str, Any], name: str) -> dict[str, Any]:
    """A file of states that is no safetensors file, verified and read without running code from it."""
    path = contents.verified(directory, manifest, name)
    try:
        found = safe_load(path)
    except Exception as error:
        raise CheckpointError(f"checkpoint file {path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"checkpoint file {path} is damaged: it holds no dictionary")
    return found


def _read_states(directory: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    name = contents.own_file(manifest, contents.STATE)
    states = read_torch(directory, manifest, name)
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        if not isinstance(states.get(counter), int):
            raise CheckpointError(f"checkpoint file {directory / name} is damaged: it lacks {counter}")
    return {"client_state": {}, **states}


def _masters_wanted(
    train_state: TrainState, manifest: dict[str, Any], wanted: Wanted
) -> Callable[[str], bool]:
    """Where the engine trains a parameter in another dtype than it was saved in, its weight is the rounded master."""
    if train_state.optimizer is None or not wanted.optimizer or wanted.custom:
        return lambda _: False
    saved = {name: entry["dtype"] for name, entry in manifest["parameters"].items()}
    other = {
        name
        for group in train_state.partition.trained
        for name in group.names
        if saved.get(name) != str(group.dtype).removeprefix("torch.")
    }
    return other.__contains__


# ---------------------------------------------------------------- the module


def _check_shapes(train_state: TrainState, manifest: dict[str, Any], directory: Path) -> None:
    saved = manifest["parameters"]
    for name, param in names.parameters(train_state.module):
        shape = list(full_shape(param))
        if name in saved and saved[name]["shape"] != shape:
            raise CheckpointError(
                f"checkpoint {directory}: parameter {name!r} has shape {saved[name]['shape']}, "
                f"the model's has {shape}"
            )


def _entries(module: nn.Module) -> dict[str, Any]:
    """What `load_state_dict` looks for: `state_dict` may be under other names, which hooks give and take back."""
    found: dict[str, Any] = {}
    for path, part in names.modules(module, remove_duplicate=False):
        own = {
            **part._parameters,
            **{n: b for n, b in part._buffers.items() if n not in part._non_persistent_buffers_set},
        }
        prefix = f"{path}." if path else ""
        found.update({prefix + name: value for name, value in own.items() if value is not None})
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            found[prefix + nn.modules.module._EXTRA_STATE_KEY_SUFFIX] = None
    return found


def _after_hooks(module: nn.Module, tensors: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The state dictionary as the module's own hooks rewrite it before it is loaded."""
    result = dict(tensors)
    for path, part in names.modules(module, remove_duplicate=False):
        for hook in part._load_state_dict_pre_hooks.values():
            errors: list[str] = []
            hook(result, f"{path}." if path else "", {}, False, [], [], errors)
            if errors:
                raise CheckpointError(f"checkpoint {directory} does not fit the model: {'; '.join(errors)}")
    return result


def prefixes_apart(module: nn.Module) -> set[str]:
    """Prefixes of modules with a `_load_from_state_dict` that is not torch's: only loading shows what it does."""
    return {
        f"{path}." if path else ""
        for path, part in names.modules(module, remove_duplicate=False)
        if not type(part)._load_from_state_dict.__module__.startswith("torch.nn.modules.")
    }


def _check_module(train_state: TrainState, staged: Staged, strict: bool) -> None:
    """Compare names and shapes of what is saved with the module's."""
    module, directory = train_state.module, staged.directory
    state = _entries(module)
    saved = _after_hooks(module, staged.tensors, directory)
    known = {*saved, *staged.pieces}
    if state and not strict and not known & state.keys():
        raise CheckpointError(
            f"checkpoint {directory} and the model have no name in common: it has {_few(known)}, "
            f"the model {_few(state)}"
        )
    free = prefixes_apart(module)
    for name, value in state.items():
        if not torch.is_tensor(value) or not torch.is_tensor(saved.get(name)) or _prefix(name) in free:
            continue
        shape, found = list(full_shape(value)), list(saved[name].shape)
        if shape != found and not (shape == [] and found == [1]):  # torch takes a number for a scalar
            raise CheckpointError(
                f"checkpoint {directory}: {name!r} has shape {found}, the model's has {shape}"
            )
    if strict:
        _check_names(staged, state, known, free)


def _few(names: Any) -> str:
    chosen = sorted(names)[:3]
    return ", ".join(map(repr, chosen)) + (", ..." if len(names) > 3 else "") if chosen else "nothing"


def _prefix(name: str) -> str:
    return name[: name.rfind(".") + 1]


def _check_names(staged: Staged, state: dict[str, Any], known: set[str], free: set[str]) -> None:
    # A tied weight may be stored under one of its names: it is missing only if none of them was stored.
    loaded = {_identity(state[name]) for name in known & state.keys() if torch.is_tensor(state[name])}
    missing = [
        name
        for name, value in state.items()
        if name not in known
        and _prefix(name) not in free
        and not (torch.is_tensor(value) and _identity(value) in loaded)
        and not name.endswith("num_batches_tracked")  # torch does without
    ]
    refuse_names(
        staged.directory, missing, [name for name in known - state.keys() if _prefix(name) not in free]
    )


def refuse_names(directory: Path, missing: list[str], unexpected: list[str]) -> None:
    """Raise the error for names that differ, if any do."""
    if not missing and not unexpected:
        return
    unexpected = sorted(unexpected)
    parts = [f"lacks {missing[0]!r}"] if missing else []
    parts += [f"has {unexpected[0]!r}, which the model lacks"] if unexpected else []
    count = len(missing) + len(unexpected)
    more = f" ({count} names differ in all)" if count > 1 else ""
    raise CheckpointError(
        f"checkpoint {directory} {' and '.join(parts)}{more}: load_module_strict=False ignores it"
    )


def _identity(tensor: torch.Tensor) -> int:
    """The same number for tensors that share their data, divided ones included."""
    own = home_of(tensor) is not None or not is_dense(tensor)
    return id(tensor) if own else tensor.data_ptr()


@contextmanager
def _taken_back(what: str, directory: Path, restore: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {directory}: {what} does not take its state: {type(error).__name__}: {error}"
        ) from error
    finally:
        restore()


def _try_extra_states(module: nn.Module, staged: Staged) -> None:
    for path, part in names.modules(module):
        name = f"{path}.{nn.modules.module._EXTRA_STATE_KEY_SUFFIX}".lstrip(".")
        if name in staged.tensors and type(part).set_extra_state is not nn.Module.set_extra_state:
            before = copy.deepcopy(part.get_extra_state())
            with _taken_back(
                f"module {path or type(part).__name__!r}",
                staged.directory,
                lambda part=part, before=before: part.set_extra_state(before),  # type: ignore[misc]
            ):
                part.set_extra_state(copy.deepcopy(staged.tensors[name]))


# ---------------------------------------------------------------- optimizer, schedule, random numbers


def _check_optimizer(train_state: TrainState, staged: Staged) -> None:
    assert train_state.optimizer is not None
    optimizer, directory = train_state.optimizer.optimizer, staged.directory
    saved = staged.states.get("optimizer")
    if saved is None:
        raise CheckpointError(
            f"checkpoint {directory} has no optimizer states: pass load_optimizer_states=False"
        )
    if saved["type"] != type(optimizer).__name__:
        raise CheckpointError(
            f"checkpoint {directory} was written with {saved['type']}, this run uses {type(optimizer).__name__}: "
            "use the same optimizer or pass load_optimizer_states=False"
        )
    if len(saved["options"]) != len(optimizer.param_groups):
        raise CheckpointError(
            f"checkpoint {directory} has {len(saved['options'])} parameter groups, "
            f"this run has {len(optimizer.param_groups)}"
        )
    copy.copy(train_state.optimizer.loss_scaler).load_state_dict(saved["loss_scale"])
    for group in train_state.optimizer.groups:
        staged.kinds.append(_check_group(group, staged, saved))
        staged.others.append(others_of_masters(group, saved["scalars"], directory))


def _expected_kinds(group: FlatGroup, saved: dict[str, Any]) -> set[str]:
    """Kinds of state that there must be at least of what a flat group holds."""
    by_group: dict[str, list[str]] = saved.get("kinds", {})  # absent from older checkpoints
    own = [kinds for name, kinds in by_group.items() if name in group.names] or by_group.values()
    return {contents.MASTER, *set.intersection(*map(set, own))} if by_group else {contents.MASTER}


def _check_group(group: FlatGroup, staged: Staged, saved: dict[str, Any]) -> list[str]:
    """The kinds of state that are stored for what a flat group holds, after all of them were found readable."""
    runs = staged.runs
    kinds = dict.fromkeys(kind for name in group.names for kind in runs.kinds(name))
    kinds.pop(contents.WEIGHT, None)
    for kind in _expected_kinds(group, saved):
        if kind not in kinds:
            raise CheckpointError(
                f"checkpoint {staged.directory} has no {kind} of {group.names[0]!r} among its optimizer states: it is "
                "damaged, or the parameter was not trained then; load_optimizer_states=False does without them"
            )
    for kind in kinds:
        for name, shape in zip(group.names, group.shapes, strict=True):
            runs.check_listed(kind, name, shape.numel())
        for member, name in enumerate(group.names):
            if (own := group.own_range(member)).stop > own.start:
                runs.check(kind, name, own.start, own.stop)
    return list(kinds)


def _try_scheduler(train_state: TrainState, staged: Staged) -> None:
    scheduler = train_state.lr_scheduler
    groups = [] if train_state.optimizer is None else train_state.optimizer.param_groups
    options = [_options(group) for group in groups]
    before = scheduler.state_dict() if hasattr(scheduler, "state_dict") else None
    try:
        before = copy.deepcopy(before)
    except Exception:  # it holds something of the script's: the values at the top must do
        before = dict(before or {})

    def restore() -> None:
        if before is not None:
            scheduler.load_state_dict(before)
        for group, kept in zip(groups, options, strict=True):
            for name, value in kept.items():
                if torch.is_tensor(group.get(name)) and torch.is_tensor(value):
                    group[name].copy_(value)  # a script, or a captured graph, holds this tensor
                else:
                    group[name] = value

    with _taken_back("the scheduler", staged.directory, restore):
        scheduler.load_state_dict(copy.deepcopy(staged.states["lr_scheduler"]))


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if torch.is_tensor(value) else value
        for name, value in group.items()
        if name != "params"
    }


def _read_rng(train_state: TrainState, directory: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """This rank's random-number states; None where the checkpoint has none for it."""
    if manifest["ranks"] != train_state.world_size:
        log_dist(
            f"checkpoint was written by {manifest['ranks']} ranks, this run has {train_state.world_size}: "
            "random-number states (dropout) are not restored",
            ranks=[0],
        )
        return None
    name = contents.rng_file(train_state.global_rank, train_state.world_size)
    states = read_torch(directory, manifest, name)
    here = {"torch": torch.get_rng_state()}
    if states.get("device_type", "cpu") == train_state.device.type:
        here["device"] = train_state.backend.runtime.get_rng_state()
    for key, mine in here.items():
        of_host = key == "torch" or train_state.backend.runtime.host_memory
        if not _is_rng_state(states.get(key), mine, of_host):
            raise CheckpointError(
                f"checkpoint file {directory / name} is damaged: {key!r} is no random-number state"
            )
    return states


def _is_rng_state(state: Any, like: torch.Tensor, of_host: bool) -> bool:
    if not isinstance(state, torch.Tensor) or (state.dtype, state.shape) != (like.dtype, like.shape):
        return False
    try:
        if of_host:
            torch.Generator().set_state(state)
    except RuntimeError:
        return False
    return True
