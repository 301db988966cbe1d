"""Gathers statistics of a model's modules while it trains: the torch side of xtrain.align.module_table.

Hooks measure on the device and wait for nothing; the numbers come to the host once per recorded step. Every
number is of the whole global batch: sums are added over micro-batches and ranks, so that it does not depend on
how the batch was split.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from xtrain.align.module_table import PHASES, STATISTICS

_SUMS = 8
"""Sum, of magnitudes, of squares, largest magnitude, not finite, sum with signs, elements, place in the order."""
_LARGEST, _SIGNED, _ELEMENTS, _PLACE = 3, 5, 6, 7
_ROW = 512
_PROJECTED = ("forward", "backward")
"""Phases in which tensors are whole: of gradients and parameters a rank may hold any piece."""
Sums = npt.NDArray[np.float64]


def _host_norm(x: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """The 2-norm, a row of elements at a time and then of those norms.

    torch's own adds squares one after the other on the host: in float32 it misses that of a million equal elements
    by almost a part in a thousand, and of 16 million by 7, which devices that add in a tree do not.
    """
    x = x.reshape(-1)
    while x.numel() > _ROW:
        rows = x.numel() // _ROW
        parts = [torch.linalg.vector_norm(x[: rows * _ROW].view(rows, _ROW), 2, dim=1, dtype=wide)]
        if rows * _ROW < x.numel():
            parts.append(torch.linalg.vector_norm(x[rows * _ROW :], 2, dtype=wide)[None])
        x = torch.cat(parts)
    return torch.linalg.vector_norm(x, 2, dtype=wide)


@lru_cache(maxsize=64)
def _signs(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """+1 or -1 for each feature: the same on every device, and in every run."""
    place = np.arange(size, dtype=np.uint64)
    mixed = (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing; it wraps
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return torch.from_numpy(1.0 - 2.0 * (mixed >> np.uint64(63))).to(device, dtype)


def measure(tensor: torch.Tensor) -> torch.Tensor:
    """On the tensor's device: sum, 1-norm, 2-norm, largest magnitude, elements not finite, sum with signs."""
    x = tensor.detach()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # On the host torch's isfinite and its norms of order 1 and infinity take ten times as long as these.
    magnitudes = x.abs()
    largest = magnitudes.amax().to(wide)
    if x.device.type == "cpu" and math.isfinite(largest):
        broken = torch.zeros((), dtype=wide)
    else:  # asking a device whether it is needed would wait for it
        broken = (x.numel() - (magnitudes < float("inf")).sum()).to(wide)
    square_root = (
        _host_norm(x, wide) if x.device.type == "cpu" else torch.linalg.vector_norm(x, 2, dtype=wide)
    )
    columns = x.sum(dim=tuple(range(x.ndim - 1)), dtype=wide) if x.ndim > 1 else x.reshape(-1).to(wide)
    signed = columns @ _signs(len(columns), x.device, wide)
    return torch.stack([columns.sum(), magnitudes.sum(dtype=wide), square_root, largest, broken, signed])


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(outputs):
        if outputs.is_floating_point() and outputs.numel():
            yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, list | tuple):
        for value in outputs:
            yield from _tensors(value)


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _data(param: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """What this rank holds of a parameter's value, in every ZeRO stage of xtrain and of DeepSpeed.

    And whether every rank holds the same.
    """
    from xtrain.zero.owners import owner_of

    if (owner := owner_of(param)) is not None:
        master = owner.master()
        data = param.new_empty(0) if master is None else master
        return data, owner.group.layout.partitions == 1
    part: torch.Tensor | None = getattr(param, "ds_tensor", None)
    if part is None or param.numel():
        return param, True
    # Of equal parts; the last ones are filled up with zeros that are no weights.
    rank = dist.get_rank(getattr(param, "ds_process_group", None))
    own = int(getattr(param, "ds_numel", part.numel())) - rank * part.numel()
    return part.detach().reshape(-1)[: max(0, own)], False


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of DistributedDataParallel, torch.compile and their kin."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile's
        if inner is None and isinstance(model, wrappers):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and its activation checkpointing put between a module's name and its parent's."""


def plain_name(name: str) -> str:
    """A module's name without the wrappers of torch in it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class ModuleStatistics:
    """Measures the modules of one model on the steps that `begin` selects.

    Attributes:
        names: of the modules; from the first measured step on in the order in which they last ran.

    Args:
        model: gets hooks; `detach` removes them.
        every: steps 1, 1 + every, 1 + 2 * every, ... are measured.
        patterns: names of modules to measure, with * and ?; None: all that have parameters of their own or no
            children.
        projected: measure `projection`. Only where every rank has whole rows of features: not with parameters that
            Megatron's layers mark as `tensor_model_parallel`.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int,
        patterns: Iterable[str] | None = None,
        projected: bool = True,
    ) -> None:
        chosen = list(patterns) if patterns is not None else None
        model = unwrapped(model)
        divided = any(getattr(param, "tensor_model_parallel", False) for param in model.parameters())
        self.every, self.projected = every, projected and not divided
        named = ((plain_name(name), module) for name, module in model.named_modules())
        self.modules = {name: module for name, module in named if self._wanted(name, module, chosen)}
        self.names = list(self.modules)
        self._order: list[int] | None = None
        self.active = False
        self._model = model
        self._rows: dict[str, list[tuple[int, float, float, torch.Tensor]]] = {}
        self._accumulated: dict[torch.Tensor, torch.Tensor] = {}
        self._handles: list[Any] = []
        for index, module in enumerate(self.modules.values()):
            self._handles.append(module.register_forward_hook(self._forward_hook(index, module)))

    @staticmethod
    def _wanted(name: str, module: nn.Module, patterns: list[str] | None) -> bool:
        if patterns is not None:
            return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        own = any(True for _ in module.parameters(recurse=False))
        return own or not any(True for _ in module.children())

    def begin(self, step: int) -> None:
        """Step number `step` (from 1) starts: measure it or not."""
        self._rows = {}
        self._accumulated.clear()
        self.active = (step - 1) % self.every == 0

    def _add(self, phase: str, index: int, tensor: torch.Tensor, copied: bool = False) -> None:
        """Measure a tensor; `copied`: every rank has the same, so that all of them together count once."""
        if tensor.numel():
            weight = 1 / dist.get_world_size() if copied and dist.is_initialized() else 1.0
            self._rows.setdefault(phase, []).append((index, tensor.numel() * weight, weight, measure(tensor)))

    def _forward_hook(self, index: int, hooked: nn.Module) -> Callable[..., None]:
        @torch.compiler.disable  # what torch.compile makes of a model is interrupted here
        def hook(module: nn.Module, _: Any, outputs: Any) -> None:
            # copy.deepcopy copies hooks, too; an evaluation between two steps is not part of either.
            if not self.active or module is not hooked or not self._model.training:
                return
            recomputed = _in_backward()  # activation checkpointing runs modules twice
            for tensor in _tensors(outputs):
                if not recomputed:
                    self._add("forward", index, tensor)
                if tensor.requires_grad and torch.is_grad_enabled():
                    tensor.register_hook(lambda grad: self._add("backward", index, grad))

        return hook

    def watch_gradients(self) -> None:
        """Measure gradients as they accumulate, for loops on one rank whose optimizer is not xtrain's."""
        for param in self._model.parameters():
            if param.requires_grad:
                self._handles.append(param.register_post_accumulate_grad_hook(self._keep_gradient))

    def _keep_gradient(self, param: torch.Tensor) -> None:
        if self.active and param.grad is not None and param.grad.layout == torch.strided:
            # The last one of a step is the sum over its micro-batches, and not yet clipped.
            self._accumulated[param] = measure(param.grad)

    def take_gradients(self) -> None:
        """Measure the averaged gradients that xtrain's engine is about to apply. Collective."""
        if not self.active:
            return
        from xtrain.zero.owners import owner_of

        for index, module in enumerate(self.modules.values()):
            for param in module.parameters(recurse=False):
                owner = owner_of(param)
                if owner is not None and owner.gradients_ready():
                    gradient = owner.gradient()
                    if gradient is not None:
                        copied = owner.group.layout.partitions == 1
                        self._add("gradient", index, gradient, copied)

    @torch.no_grad()
    def finish(
        self, device: torch.device | str, scale: float = 1.0, replicas: int = 1
    ) -> dict[str, dict[str, list[float | None]]]:
        """End the step: statistics by phase and name, float32, one a module (None: it did not run).

        Collective over all ranks.

        Args:
            device: on which numbers travel between ranks.
            scale: by which the loss was multiplied before it was differentiated.
            replicas: data-parallel ranks, over which gradients are averaged after backward.
        """
        if not self.active:
            return {}
        for index, module in enumerate(self.modules.values()):
            for param in module.parameters(recurse=False):
                if param in self._accumulated:
                    row = (index, float(param.numel()), 1.0, self._accumulated[param])
                    self._rows.setdefault("gradient", []).append(row)
                if param.is_floating_point():
                    self._add("optimizer", index, *_data(param))
        ranks = _of_all_ranks(np.stack([self._totals(phase) for phase in PHASES]), device)
        if self._order is None:
            self._order = _order(ranks[:, PHASES.index("forward"), :, _PLACE])
            self.names = [self.names[index] for index in self._order]
        totals = _added(ranks)[:, self._order]
        scales = {"backward": scale * replicas, "gradient": scale}
        self._rows = {}
        return {
            phase: _statistics(total, scales.get(phase, 1.0), self.projected and phase in _PROJECTED)
            for phase, total in zip(PHASES, totals, strict=True)
            if total[:, _ELEMENTS].any()
        }

    def _totals(self, phase: str) -> Sums:
        total = np.zeros((len(self.modules), _SUMS))
        rows = self._rows.get(phase, [])
        if not rows:
            return total
        numbers = torch.stack([row.float() for *_, row in rows]).cpu().double().numpy()
        numbers[:, 2] **= 2
        for place, ((index, elements, weight, _), row) in enumerate(zip(rows, numbers, strict=True), 1):
            largest = max(total[index, _LARGEST], row[_LARGEST]) if not np.isnan(row[_LARGEST]) else np.nan
            total[index, :_ELEMENTS] += row * weight
            total[index, _LARGEST] = largest
            total[index, _ELEMENTS] += elements
            # Of the last call: what ran between two calls is not to come after both.
            total[index, _PLACE] = place
        return total

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _of_all_ranks(totals: Sums, device: torch.device | str) -> Sums:
    """(ranks, phases, modules, sums)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return totals[None]
    mine = torch.from_numpy(totals).to(device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return np.stack([part.cpu().numpy() for part in everyone])


def _added(ranks: Sums) -> Sums:
    # Added here, in rank order: not every library adds float64.
    combined: Sums = ranks.sum(axis=0)
    combined[..., _LARGEST] = ranks[..., _LARGEST].max(axis=0)
    return combined


def _order(places: Sums) -> list[int]:
    """Modules in the order in which they last ran, from their places on each rank (0: not there).

    What ran on an earlier rank comes first: pipeline stages are in the order of ranks. What has not run comes last.
    """

    def key(index: int) -> tuple[int, float]:
        ran = np.flatnonzero(places[:, index])
        return (int(ran[0]), float(places[ran[0], index])) if len(ran) else (len(places), index)

    return sorted(range(places.shape[1]), key=key)


def _statistics(total: Sums, scale: float, projected: bool) -> dict[str, list[float | None]]:
    elements = total[:, _ELEMENTS]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        columns = (
            total[:, 0] / elements / scale,
            total[:, 1] / elements / scale,
            np.sqrt(total[:, 2] / elements) / scale,
            total[:, 3] / scale,
            total[:, _SIGNED] / np.sqrt(elements) / scale,
            total[:, 4],
        )
        singles = dict(zip(STATISTICS, (column.astype(np.float32) for column in columns), strict=True))
    if not projected:
        del singles["projection"]
    ran = elements > 0
    return {
        # Nine digits hold a float32 exactly.
        name: [float(f"{value:.9g}") if there else None for value, there in zip(column, ran, strict=True)]
        for name, column in singles.items()
    }
