"""Silent data corruption: ranks compare what they must have in common, and each that its own has not changed.

Cheap: a checksum of raw bits, and one all-gather of two integers a rank, every so many steps. It finds memory that
changed and updates that went differently, on whatever rank; not a wrong gradient that all ranks then share. See
docs/sdc.md.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from xtrain import comm
from xtrain.base.errors import TrainingError
from xtrain.base.log import log_dist
from xtrain.config.fake import SdcCheckConfig
from xtrain.engine.hooks import Hooks
from xtrain.integrity.checksum import checksum
from xtrain.integrity.recomputation import Recompute
from xtrain.zero import names
from xtrain.zero.flat import FlatGroup
from xtrain.zero.train_state import TrainState


def _combined(sums: list[int]) -> int:
    """One 64-bit number for a list of them, as a signed integer."""
    total = 0
    for value in sums:
        total = (total * 6364136223846793005 + value + 1442695040888963407) % 2**64
    return total - 2**64 if total >= 2**63 else total


def culprits(digests: list[int]) -> tuple[list[int], list[int]]:
    """Who is wrong among ranks that should agree.

    Returns:
        (positions whose value is not the majority's, []), or ([], all positions) where no value has a majority.
    """
    value, votes = Counter(digests).most_common(1)[0]
    if 2 * votes <= len(digests):
        return [], list(range(len(digests)))
    return [place for place, digest in enumerate(digests) if digest != value], []


def attach(state: TrainState, hooks: Hooks, section: SdcCheckConfig | None) -> None:
    """Check before every so-many-th update; nothing without the config's section."""
    if section is not None:
        SdcCheck(state, hooks, section)


class SdcCheck:
    """The checks of one state.

    Raises:
        TrainingError: with `on_mismatch` "error", on every rank of the data-parallel group.
    """

    def __init__(self, state: TrainState, hooks: Hooks, section: SdcCheckConfig) -> None:
        self._section = section
        self._noted: dict[str, int] | None = None
        self._noted_at = -1
        self._recompute = Recompute(state, hooks, self._due) if section.recompute else None
        hooks.before_step.append(self._before_step)
        hooks.after_update.append(self._after_update)
        hooks.on_load.append(self._on_load)

    def _before_step(self, state: TrainState, boundary: bool) -> None:
        if boundary and self._due(state.counters.global_steps + 1):
            self._check(state)

    def _after_update(self, state: TrainState) -> None:
        if self._recompute is not None:
            self._recompute.forget()
        if self._section.own_states and self._due(state.counters.global_steps + 1):
            self._note(state)

    def _on_load(self, _: TrainState) -> None:
        self._noted = None

    def _due(self, step: int) -> bool:
        return step % self._section.every == 0

    # ---------------------------------------------------------------- what is compared

    def _shared(self, state: TrainState) -> list[tuple[str, torch.Tensor]]:
        """What every rank of the data-parallel group has whole: parameters that are not divided."""
        sharded = {param for group in state.partition.sharded for param in group.members}
        return [(name, p) for name, p in names.parameters(state.module) if p not in sharded and p.numel()]

    def _own(self, state: TrainState) -> Iterator[tuple[str, torch.Tensor]]:
        """What nobody else has: this rank's slices of parameters, of masters and of optimizer states."""
        for sharded in state.partition.sharded:
            for member, name in enumerate(sharded.names):
                if (mine := sharded.in_shard(member, sharded.shard)) is not None:
                    yield f"parameter {name!r}", mine
        if state.optimizer is None:
            return
        for group in state.partition.trained:
            for member, name in enumerate(group.names):
                if (master := group.master_of(member)) is None:
                    continue
                yield f"the master weights of parameter {name!r}", _elements(group, member, master.data)
                for kind, value in sorted(state.optimizer.state.get(master, {}).items()):
                    if torch.is_tensor(value) and value.shape == master.shape:
                        yield f"{kind} of parameter {name!r}", _elements(group, member, value)

    @staticmethod
    def _sums(state: TrainState, items: list[tuple[str, torch.Tensor]]) -> list[int]:
        """Their checksums, fetched from the device at once; what is offloaded is read where it is."""
        if not items:
            return []
        sums: list[int] = torch.stack([checksum(tensor).to(state.device) for _, tensor in items]).tolist()
        return sums

    def _note(self, state: TrainState) -> None:
        """Remember this rank's own states as the update has left them."""
        if not state.partition.offloaded:
            items = list(self._own(state))
            self._noted = dict(zip((name for name, _ in items), self._sums(state, items), strict=True))
            self._noted_at = state.counters.global_steps

    def _changed(self, state: TrainState) -> str | None:
        """The first of the own states that has changed since it was noted."""
        if self._noted is None or self._noted_at != state.counters.global_steps or state.partition.offloaded:
            return None
        items = list(self._own(state))
        for (name, _), value in zip(items, self._sums(state, items), strict=True):
            if self._noted.get(name, value) != value:
                return name
        return None

    # ---------------------------------------------------------------- comparing

    def _check(self, state: TrainState) -> None:
        grid = state.grid
        shared = self._shared(state)
        sums = self._sums(state, shared)
        changed = self._changed(state)
        self._noted = None
        other = self._recompute.check() if self._recompute is not None else None
        found = int(changed is not None or other is not None)
        mine = torch.tensor([_combined(sums), found], dtype=torch.int64, device=state.device)
        rows = torch.empty(grid.size * 2, dtype=torch.int64, device=state.device)
        comm.all_gather_into_tensor(rows, mine, group=grid.group)
        digests, flags = rows.view(-1, 2).t().tolist()
        problem = None
        if len(set(digests)) > 1 or any(flags):
            problem = self._explain(state, [name for name, _ in shared], sums, (changed, other))
        self._report(state, problem)

    def _explain(
        self,
        state: TrainState,
        names: list[str],
        sums: list[int],
        alone: tuple[str | None, tuple[int, str] | None],
    ) -> str:
        """Who differs in what; every rank of the group calls, and gets the same sentence.

        Args:
            sums: checksums of the parameters called `names`.
            alone: what changed on this rank, and what it computed otherwise than its neighbour.
        """
        everyone: list[Any] = [None] * state.grid.size
        comm.all_gather_object(everyone, (state.global_rank, sums, alone), group=state.grid.group)
        ranks = [rank for rank, _, _ in everyone]
        found = [
            f"rank {rank}: {what} changed between two updates" for rank, _, (what, _) in everyone if what
        ]
        pairs = [(rank, other) for rank, _, (_, other) in everyone if other is not None]
        found += [
            f"the first micro-batch of rank {neighbour}, computed again on rank {rank}, has {what}"
            for rank, (neighbour, what) in pairs
        ]
        checked = [rank for rank, (neighbour, _) in pairs if any(n == rank and r != n for r, (n, _) in pairs)]
        if len(checked) == 1 and len(ranks) > 2:
            found.append(f"rank {checked[0]} is in both")
        differing = [i for i in range(len(names)) if len({theirs[i] for _, theirs, _ in everyone}) > 1]
        if differing:
            first = differing[0]
            wrong, undecided = culprits([theirs[first] for _, theirs, _ in everyone])
            more = f" (and {len(differing) - 1} more parameters)" if len(differing) > 1 else ""
            if undecided:
                found.append(
                    f"parameter {names[first]!r}{more} is not the same on ranks {', '.join(map(str, ranks))}, and no "
                    "majority tells which is right"
                )
            else:
                named = ", ".join(str(ranks[place]) for place in wrong)
                found.append(
                    f"parameter {names[first]!r}{more} on rank {named} is not that of the {len(ranks) - len(wrong)} "
                    "other ranks"
                )
        return "; ".join(found)

    def _report(self, state: TrainState, problem: str | None) -> None:
        model = state.grid.model
        if model.size > 1:
            # Ranks that hold other parts of the model end training with this one.
            problems: list[str | None] = [None] * model.size
            comm.all_gather_object(problems, problem, group=model.group)
            problem = problem or next((other for other in problems if other), None)
        if problem is None:
            return
        sentence = (
            f"step {state.counters.global_steps + 1}: silent data corruption: {problem}: test that machine, and go on "
            "from the last checkpoint"
        )
        if self._section.on_mismatch == "error":
            raise TrainingError(sentence)
        log_dist(sentence, ranks=[state.grid.source], level=logging.WARNING)


def _elements(group: FlatGroup, member: int, value: torch.Tensor) -> torch.Tensor:
    """This rank's elements of a parameter in a tensor that is laid out like its master."""
    mine = group.in_master(member, lambda _: value)
    assert mine is not None
    return mine
