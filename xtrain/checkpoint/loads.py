"""Whether the ranks of an engine have loaded the same: found out without a collective inside `load_checkpoint`.

docs/decisions/0008-loading-alone.md says why.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from xtrain import comm
from xtrain.base.errors import CheckpointError
from xtrain.comm.meeting import listed
from xtrain.comm.rank_agreement import alone, together
from xtrain.parallel import DataParallelGrid

PATIENCE = 5.0
"""Seconds that a rank waits in `load_checkpoint` for the others before it loads alone. Ranks that load one after the
other inside a file lock lose them once, all together."""


class _Circle:
    """Ranks that compare what they have loaded, and whether they have to.

    Args:
        name: of the engine's circles of one kind, of which every rank is in one.
    """

    def __init__(self, name: str, group: dist.ProcessGroup | None) -> None:
        ranks = comm.get_all_ranks_from_group(group)
        self._roll_call = comm.RollCall(f"{name} from rank {ranks[0]}", ranks)
        self._comparisons = 0
        self.due = True

    def compare(self, mine: str, note: str) -> dict[str, list[int]] | None:
        self._comparisons += 1
        return self._roll_call.compare(f"comparison {self._comparisons} of what was loaded", mine, note)


class Loads:
    """What this rank of an engine has loaded since the ranks last agreed. Making it is collective.

    Where all ranks are inside `load_checkpoint` at the same time, they load together. Where they are not, each loads
    alone, and `check` compares, before anything is done with the weights that reaches another rank.

    Args:
        grid: the engine's ranks.
    """

    def __init__(self, grid: DataParallelGrid) -> None:
        self.broken: str | None = None
        """Why this rank's states are a mixture of before and after a load; None: they are not."""
        self._broken_parts: set[str] = set()
        self._loaded: list[tuple[str, str]] = []  # (what is compared, what is said about it)
        self._calls = 0
        self._data: _Circle | None = None
        self._model: _Circle | None = None
        self._everyone: comm.RollCall | None = None
        if comm.get_world_size() == 1:
            return
        name = _common_name(grid)
        if grid.size > 1:
            self._data = _Circle(f"{name} data", grid.group)
        if grid.model.size > 1:
            self._model = _Circle(f"{name} model", grid.model.group)
        if grid.size * grid.model.size == comm.get_world_size():
            self._everyone = comm.RollCall(name, range(comm.get_world_size()))

    def begin(self, wait: bool = False) -> Load:
        """A call of `load_checkpoint` begins.

        Args:
            wait: as long as a collective would, because the call needs all ranks anyway.
        """
        self._calls += 1
        question = f"load {self._calls}"
        agreed = comm.get_world_size() == 1
        if self._everyone is not None:
            patience = self._everyone.timeout.total_seconds() if wait else PATIENCE
            agreed = self._everyone.all_here(question, patience)
        if not agreed:  # also when this load finds nothing, or fails
            self._make_due()
        return Load(self._everyone, agreed, question)

    def note(self, mine: str, said: str, parts: set[str], complete: bool, agreed: bool) -> None:
        """A load has been applied.

        Args:
            mine: what the ranks must have in common about it.
            said: how it is called in errors.
            parts: of the engine that it has replaced.
            complete: it has replaced all that was there.
            agreed: all ranks have applied the same.
        """
        self._broken_parts -= parts
        if not self._broken_parts:
            self.broken = None
        if complete:
            self._loaded = []
        if agreed and complete:
            for circle in self._circles():
                circle.due = False
        else:
            self._loaded.append((mine, said))

    def fail(self, why: str, parts: set[str]) -> None:
        """These parts are a mixture now: `check` raises until they have been loaded well."""
        self.broken = why
        self._broken_parts |= parts
        self._make_due()

    def check(self) -> None:
        """Compare with the ranks that hold the same parameters, once after each load; costs nothing otherwise.

        Called before gradients are reduced. Every one of these ranks must come.

        Raises:
            CheckpointError: on every rank, when they have not loaded the same.
        """
        if self._data is not None and self._data.due:
            self._compare(self._data)
        elif self.broken is not None:
            raise CheckpointError(self.broken)

    def check_parts(self) -> None:
        """`check` for the ranks that hold the other parts of the model. Called before an update."""
        if self._model is not None and self._model.due:
            self._compare(self._model)

    def _make_due(self) -> None:
        for circle in self._circles():
            circle.due = True

    def _circles(self) -> list[_Circle]:
        return [circle for circle in (self._data, self._model) if circle is not None]

    def _compare(self, circle: _Circle) -> None:
        mine = " then ".join(key for key, _ in self._loaded) + ("" if self.broken is None else " broken")
        said = " and then ".join(text for _, text in self._loaded) or "nothing"
        note = said if self.broken is None else f"{said} ({self.broken})"
        different = circle.compare(mine, note)
        if different is not None:
            raise CheckpointError(_different("loaded", different))
        if self.broken is not None:
            raise CheckpointError(self.broken)
        circle.due = False
        if not any(other.due for other in self._circles()):
            self._loaded = []


class Load:
    """One call of `load_checkpoint`.

    Attributes:
        agreed: all ranks are in it together; then each step of it is made by all of them or by none.
    """

    def __init__(self, roll_call: comm.RollCall | None, agreed: bool, question: str) -> None:
        self._roll_call, self._question = roll_call, question
        self.agreed = agreed

    def run(self, action: Callable[[], Any], what: str) -> list[Any]:
        """Run `action` on every rank, or alone; the results of the ranks that are in it together.

        Raises:
            CheckpointError: on all these ranks, when it failed on one.
        """
        return (
            together(action, what, CheckpointError) if self.agreed else [alone(action, what, CheckpointError)]
        )

    def compare(self, found: list[tuple[str, str]]) -> None:
        """Raise unless the ranks have found the same; those that load alone compare with who came first.

        Args:
            found: of each rank that is in it together: what is compared, and what is said about it.
        """
        notes: dict[str, list[int]] = {}
        if self.agreed:
            for rank, (_, said) in enumerate(found):
                notes.setdefault(said, []).append(rank)
            if len({mine for mine, _ in found}) > 1:
                raise CheckpointError(_different("found", notes))
        elif self._roll_call is not None:
            mine, said = found[0]
            other, _, theirs = self._roll_call.first(self._question, f"{mine}\n{said}").partition("\n")
            if other != mine:
                raise CheckpointError(
                    f"rank {comm.get_rank()} found {said}, another rank has found {theirs} before: every rank must "
                    "load the same checkpoint"
                )


def _common_name(grid: DataParallelGrid) -> str:
    """A name that the ranks of one engine share, and no others ever. Collective over them."""
    name = uuid.uuid4().hex
    for group, size in ((grid.group, grid.size), (grid.model.group, grid.model.size)):
        if size > 1:
            names = [""] * size
            comm.all_gather_object(names, name, group=group)
            name = names[0]
    return f"loads {name}"


def _different(done: str, notes: dict[str, list[int]]) -> str:
    said = "; ".join(f"{listed(ranks)} {done} {what}" for what, ranks in notes.items())
    return f"the ranks have not {done} the same: {said}: every rank must load the same checkpoint"
