"""The tensors of a checkpoint by parameter name: whole in one file, or in runs of elements in several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from xtrain.base.errors import CheckpointError
from xtrain.checkpoint import contents
from xtrain.zero.shards import ShardedGroup


def _open(directory: Path, manifest: dict[str, Any], name: str) -> Any:
    """A safetensors file, after its content was compared with the manifest's checksum."""
    path = contents.verified(directory, manifest, name)
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint file {path} cannot be read: {error}") from None


class Runs:
    """Reads runs of elements, opening and verifying each optimizer file once, when first needed."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self._opened: dict[str, Any] = {}

    def _file(self, name: str) -> Any:
        if name not in self._opened:
            self._opened[name] = _open(self.directory, self.manifest, name)
        return self._opened[name]

    def kinds(self, parameter: str) -> list[str]:
        """Kinds of state stored for a parameter."""
        return list(dict.fromkeys(kind for _, kind, _, _ in self.manifest["runs"].get(parameter, [])))

    def _stored(self, name: str, kind: str, parameter: str, low: int, high: int) -> Any:
        """The slice of an opened file that holds a run."""
        key = contents.run_key(kind, parameter, low)
        try:
            stored = self._file(name).get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(
                f"checkpoint {self.directory} is damaged: file {name} does not hold {key!r} ({error})"
            ) from None
        if stored.get_shape() != [high - low]:
            raise CheckpointError(
                f"checkpoint {self.directory} is damaged: {key!r} in file {name} has shape {stored.get_shape()}, "
                f"the manifest says {high - low} elements"
            )
        return stored

    def dtype(self, kind: str, parameter: str) -> torch.dtype:
        """Dtype of the stored runs of a kind of state."""
        name, _, low, high = next(run for run in self.manifest["runs"][parameter] if run[1] == kind)
        empty: torch.Tensor = self._stored(name, kind, parameter, low, high)[:0]
        return empty.dtype

    def _covering(self, kind: str, parameter: str, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """(file, first, last element) of the runs that [start, stop) of a parameter's state lies in, in order.

        Raises:
            CheckpointError: they leave a gap, or overlap.
        """
        runs = sorted(
            (low, high, name)
            for name, entry_kind, low, high in self.manifest["runs"].get(parameter, [])
            if entry_kind == kind and max(start, low) < min(stop, high)
        )
        reached = start
        for number, (low, high, name) in enumerate(runs):
            if low > reached or (number and low != reached):
                break
            yield name, low, high
            reached = high
        if reached < stop:
            raise CheckpointError(
                f"checkpoint {self.directory} has {max(0, reached - start)} of {stop - start} elements of {kind} of "
                f"{parameter!r} in one piece"
            )

    def check_listed(self, kind: str, parameter: str, elements: int) -> None:
        """Raise a CheckpointError unless the manifest lists all elements of a state; opens no file."""
        for _ in self._covering(kind, parameter, 0, elements):
            pass

    def check(self, kind: str, parameter: str, start: int, stop: int) -> None:
        """Raise a CheckpointError unless [start, stop) of a parameter's state can be read; verifies the files."""
        for name, low, high in self._covering(kind, parameter, start, stop):
            self._stored(name, kind, parameter, low, high)

    def fill(self, out: torch.Tensor, kind: str, parameter: str, start: int) -> None:
        """Copy elements [start, start + len(out)) of a parameter's state into `out`."""
        stop = start + out.numel()
        for name, low, high in self._covering(kind, parameter, start, stop):
            first, last = max(start, low), min(stop, high)
            stored = self._stored(name, kind, parameter, low, high)
            out[first - start : last - start].copy_(stored[first - low : last - low])


class Weights:
    """The weights of a checkpoint by name: whole in one file, or in runs (ZeRO stage 3).

    Args:
        masters: whether to take a parameter's master, in its dtype, where there is one.

    Attributes:
        names: of all weights and buffers, further names of tied ones included.
        aliases: further name of a tied weight -> the name it is stored under.
        renamed: name of a parameter -> another that the module's `state_dict` gives it. A whole weight is stored under
            the latter, runs under the former.
    """

    def __init__(self, runs: Runs, masters: Callable[[str], bool] = lambda name: False) -> None:
        manifest = runs.manifest
        self._runs = runs
        self._masters = masters
        self._file = _open(runs.directory, manifest, contents.own_file(manifest, contents.MODEL))
        self._in_file = set(self._file.keys())
        self._parameters = manifest["parameters"]
        stored = self._in_file | {name for name in manifest["runs"] if self._kind(name) is not None}
        aliases: dict[str, str] = manifest.get("aliases", {})
        self.aliases = {
            alias: name for alias, name in aliases.items() if name in stored and alias not in stored
        }
        self.names = stored | self.aliases.keys()
        self.renamed: dict[str, str] = manifest.get("renamed", {})

    def has_master(self, name: str) -> bool:
        """Whether there is a master of the parameter."""
        return contents.MASTER in self._runs.kinds(self.aliases.get(name, name))

    def _kind(self, name: str) -> str | None:
        """The kind of runs that a weight is read from; None for one that is whole in the file, or absent."""
        kinds = self._runs.kinds(name)
        if contents.MASTER in kinds and self._masters(name):
            return contents.MASTER
        if name in self._in_file or name not in self._parameters:
            return None
        return next((kind for kind in (contents.WEIGHT, contents.MASTER) if kind in kinds), None)

    def shape(self, name: str) -> list[int]:
        """Shape of a weight or buffer."""
        name = self.aliases.get(name, name)
        if self._kind(name) is None:
            shape: list[int] = self._file.get_slice(name).get_shape()
            return shape
        return list(self._parameters[name]["shape"])

    def whole(self, name: str) -> torch.Tensor:
        """A whole tensor, in its shape."""
        name = self.aliases.get(name, name)
        kind = self._kind(name)
        if kind is None:
            found: torch.Tensor = self._file.get_tensor(name)
            return found
        shape = torch.Size(self._parameters[name]["shape"])
        # A master that is the weight has the weight's dtype; one that is preferred to it keeps its own.
        data = torch.empty(shape.numel(), dtype=self._runs.dtype(kind, name))
        self._runs.fill(data, kind, name, 0)
        return data.view(shape)

    def check_piece(self, name: str, group: ShardedGroup, member: int) -> None:
        """Raise a CheckpointError unless `load_piece` will succeed."""
        name = self.aliases.get(name, name)
        kind, found = self._kind(name), group.piece_of(member)
        if kind is not None and found is not None:
            self._runs.check(kind, name, found[0].start, found[0].stop)

    def load_piece(self, name: str, group: ShardedGroup, member: int) -> None:
        """Set what this rank owns of a divided parameter."""
        name = self.aliases.get(name, name)
        kind, found = self._kind(name), group.piece_of(member)
        if kind is None:
            group.store(member, self._file.get_tensor(name).to(group.device))
        elif found is not None:
            piece, _, _ = found
            mine = torch.empty(piece.stop - piece.start, dtype=group.dtype)
            self._runs.fill(mine, kind, name, piece.start)
            group.shard[piece.shard_start : piece.shard_start + mine.numel()].copy_(mine)
