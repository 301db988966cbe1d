"""Writes the run record while something trains: a DeepSpeed-like engine, or any PyTorch loop.

An engine is asked for nothing but DeepSpeed's methods (xtrain's own engine or the real one). `attach` registers at the
hooks of xtrain's own, and wraps `backward` and `step`, or `train_batch`, of others. A loop of one's own calls `step`
itself and needs neither an engine nor torch.distributed.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xtrain.align.environment import describe
from xtrain.align.record import VERSION
from xtrain.align.record_file import RecordFile
from xtrain.align.statistics import ModuleStatistics
from xtrain.base.errors import RecordError
from xtrain.base.run_folder import METRICS, RUN_DIR_VARIABLE
from xtrain.engine.hooks import Hooks
from xtrain.parallel import DataParallelGrid
from xtrain.version import __version__

MOST_RANKS = 64
"""Up to so many ranks each rank's own loss is written: with it a comparison can point at one rank."""


def _default_path() -> Path:
    if RUN_DIR_VARIABLE not in os.environ:
        raise RecordError(f"Recorder needs a path: pass one, or set {RUN_DIR_VARIABLE} to a run folder")
    return Path(os.environ[RUN_DIR_VARIABLE]) / METRICS


def _number(value: Any) -> float | None:
    """A Python number from a number or a tensor of one element."""
    if value is None:
        return None
    if torch.is_tensor(value):
        return float(value.detach().double().cpu()) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None


def _loss_scale(engine: Any) -> float | None:
    """The scale of the gradients that the next step applies. DeepSpeed's engine.loss_scale() is the config's."""
    optimizer = getattr(engine, "optimizer", None)
    for name in ("cur_scale", "loss_scale"):
        found = getattr(optimizer, name, None)
        if not callable(found) and (scale := _number(found)) is not None:
            return scale
    return None


def _tensor_parallel(engine: Any) -> bool:
    """Whether ranks may hold parts of a module's features: an engine that is not xtrain's, with an mpu, may."""
    if isinstance(grid := getattr(engine, "grid", None), DataParallelGrid):
        return grid.model.tensor > 1
    return getattr(engine, "mpu", None) is not None


class Recorder:
    """Records loss, gradient norm, learning rate, loss scale, tokens and time of each optimizer step.

    The loss of a step is the mean over micro-batches and over ranks with (parts of) samples of their own, added up
    in float64.

    In a loop without an engine::

        recorder = Recorder("reference.jsonl", model=model, modules_every=10)
        for batch in batches:
            loss = train_step(batch)
            recorder.step(loss=loss, grad_norm=norm, lr=lr)

    Args:
        path: the record; lines are appended. None: `metrics.jsonl` in the run folder that XTRAIN_RUN_DIR names.
        header: facts about the run that go into the header line.
        tokens_per_sample: with it, every line says how many tokens the step consumed.
        flag: asked once per step on every rank; whether it is True on any reaches all in the same collective as
            the loss (see `raised`).
        counts: whether this rank's losses are in the mean: not where another has the same, or where a pipeline
            stage that is not the last has none.
        model: whose modules are measured, for loops without an engine; `step(model=...)` does the same later.
        modules_every: measure the modules on every so many steps; None: never.
        modules: names of modules to measure, with * and ?; None: see ModuleStatistics.
        config: the run's settings, for the header: what `xtrain align` compares first.
        more: asked once per step for further keys of its line.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        header: dict[str, Any] | None = None,
        tokens_per_sample: int | None = None,
        flag: Callable[[], bool] | None = None,
        counts: bool = True,
        model: nn.Module | None = None,
        modules_every: int | None = None,
        modules: Iterable[str] | None = None,
        config: dict[str, Any] | None = None,
        more: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self.path = _default_path() if path is None else Path(path)
        self.header = {**(header or {}), **({} if config is None else {"config": config})}
        self.tokens_per_sample = tokens_per_sample
        self.flag = flag
        self.counts = counts
        self.more = more
        self.raised = False
        """Whether `flag` answered True on any rank at the last step; the same on every rank."""
        if modules_every is not None and modules_every < 1:
            raise RecordError(f"modules_every is {modules_every}: give a number of steps, or None for never")
        self.modules_every = modules_every
        self._patterns = None if modules is None else list(modules)
        self._statistics: ModuleStatistics | None = None
        self._losses: list[torch.Tensor] = []
        self._file: RecordFile | None = None
        self._named = False  # whether the names of the modules stand in the file
        self._own_step = 0
        self._start = self._last = time.perf_counter()
        if model is not None:
            self._watch(model, first_step=1)
            self._watch_gradients()

    # ---------------------------------------------------------------- an engine

    def attach(self, engine: Any, after_step: Callable[[Any], None] | None = None) -> None:
        """Record every step of `engine` from now on; call `after_step(engine)` after each line."""
        if self.modules_every is not None:
            self._watch(engine.module, engine.global_steps + 1, whole=not _tensor_parallel(engine))
        # Instance attributes in what follows; nn.Module keeps functions apart from parameters and modules.
        if callable(train_batch := getattr(engine, "train_batch", None)):
            engine.train_batch = self._recorded_train_batch(engine, train_batch, after_step)
        elif isinstance(hooks := getattr(engine, "train_hooks", None), Hooks):
            self._register(engine, hooks, after_step)
        else:
            self._wrap(engine, after_step)
        self._start = self._last = time.perf_counter()

    def _register(self, engine: Any, hooks: Hooks, after_step: Callable[[Any], None] | None) -> None:
        """Be called by an engine of xtrain's own."""
        rates: tuple[list[float], float | None] = [], None

        def before_update(_: Any) -> None:
            nonlocal rates
            rates = list(engine.get_lr()), _loss_scale(engine)
            if self._statistics is not None:
                self._statistics.take_gradients()

        def after_update(_: Any) -> None:
            self._record_engine(engine, *rates)
            if after_step is not None:
                after_step(engine)

        hooks.before_backward.append(lambda _, loss: self._losses.append(loss.detach().clone()))
        hooks.on_discard.append(lambda _: self._losses.clear())
        hooks.before_update.append(before_update)
        hooks.after_update.append(after_update)
        hooks.on_destroy.append(lambda _: self.close())

    def _wrap(self, engine: Any, after_step: Callable[[Any], None] | None) -> None:
        """Replace methods of an engine that has no hooks."""
        backward, step = engine.backward, engine.step

        @wraps(backward)
        def recorded_backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._losses.append(loss.detach().clone())  # a script may go on to change it in place
            return backward(loss, *args, **kwargs)

        @wraps(step)
        def recorded_step(*args: Any, **kwargs: Any) -> Any:
            before, lr, scale = engine.global_steps, list(engine.get_lr()), _loss_scale(engine)
            result = step(*args, **kwargs)
            if engine.global_steps != before:
                self._record_engine(engine, lr, scale)
                if after_step is not None:
                    after_step(engine)
            return result

        engine.backward, engine.step = recorded_backward, recorded_step

    def _recorded_train_batch(
        self, engine: Any, train_batch: Callable[..., Any], after_step: Callable[[Any], None] | None
    ) -> Callable[..., Any]:
        """For DeepSpeed's pipeline engine, whose one call is a step and returns the mean loss on every rank."""

        @wraps(train_batch)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            lr, scale = list(engine.get_lr()), _loss_scale(engine)
            loss = train_batch(*args, **kwargs)
            self._losses.append(loss.detach().clone())
            self._record_engine(engine, lr, scale)
            if after_step is not None:
                after_step(engine)
            return loss

        return recorded

    def _record_engine(self, engine: Any, lr: list[float], scale: float | None) -> None:
        losses = [loss.reshape(()) for loss in self._losses] or [torch.tensor(float("nan"))]
        mean = torch.stack(losses).cpu().double().mean()  # float64 is the host's: not every device adds it
        self._losses.clear()
        loss, by_rank = self._over_ranks(float(mean), engine.device)
        norm = engine.get_global_grad_norm()
        line: dict[str, Any] = {
            "grad_norm": _number(norm),
            "lr": lr,
            "loss_scale": scale,
            "applied": bool(engine.was_step_applied()),
        }
        if self.tokens_per_sample:
            line["tokens"] = engine.train_batch_size() * self.tokens_per_sample
        if self.more is not None:
            line |= self.more()
        replicas = int(getattr(engine, "dp_world_size", engine.world_size))
        measured = self._finish_statistics(engine.device, scale or 1.0, replicas, engine.global_steps + 1)
        if engine.global_rank == 0:
            if self._file is None:
                self._open(engine.world_size, engine.device)
            self._write(engine.global_steps, loss, by_rank, line, measured)

    # ---------------------------------------------------------------- a loop of one's own

    def step(
        self,
        loss: Any,
        *,
        grad_norm: Any = None,
        lr: Any = None,
        loss_scale: Any = None,
        tokens: int | None = None,
        step: int | None = None,
        model: nn.Module | None = None,
        applied: bool = True,
        **more: Any,
    ) -> None:
        """Record an optimizer step that has just been made. With torch.distributed, every rank calls it.

        Args:
            loss: number or tensor of one element, of this rank; the mean over ranks is recorded. Over several
                ranks it is to be on the device that the ranks communicate from.
            grad_norm: 2-norm of the gradients before clipping.
            lr: learning rate in this step, or a list with that of each parameter group.
            loss_scale: by which the loss was multiplied before backward.
            tokens: that the step consumed.
            step: its number, from 1; None: one more than the last.
            model: measure its modules from the next step on, if `modules_every` was given.
            applied: False when the optimizer skipped the step.
            more: further numbers of the step, under their names.

        Raises:
            RecordError: the loss is not one number.
        """
        number = _number(loss)
        if number is None:
            raise RecordError(
                f"step() takes the loss as a number or a tensor of one element, not {loss!r:.80}"
            )
        self._own_step = self._own_step + 1 if step is None else int(step)
        device = loss.device if torch.is_tensor(loss) else torch.device("cpu")
        mean, by_rank = self._over_ranks(number, device)
        scale = _number(loss_scale)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        measured = self._finish_statistics(device, scale or 1.0, ranks, self._own_step + 1)
        if model is not None and self._statistics is None:
            self._watch(model, first_step=self._own_step + 1)
            self._watch_gradients()
        if not dist.is_initialized() or dist.get_rank() == 0:
            line = {
                "grad_norm": _number(grad_norm),
                "lr": [_number(item) for item in lr] if isinstance(lr, list | tuple) else [_number(lr)],
                "loss_scale": scale,
                "applied": bool(applied),
                **({} if tokens is None else {"tokens": tokens}),
                **{name: _number(value) for name, value in more.items()},
            }
            if self._file is None:
                self._open(ranks, device)
            self._write(self._own_step, mean, by_rank, line, measured)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- modules

    def _watch(self, model: nn.Module, first_step: int, whole: bool = True) -> None:
        if self.modules_every is None:
            return
        self._statistics = ModuleStatistics(model, self.modules_every, self._patterns, whole)
        if not self._statistics.names:
            raise RecordError(f"no module is called {' or '.join(self._patterns or ['anything'])}")
        self._statistics.begin(first_step)

    def _watch_gradients(self) -> None:
        # Over several ranks `param.grad` is this rank's own, or a part: not what the optimizer gets.
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        if self._statistics is not None and alone:
            self._statistics.watch_gradients()

    def _finish_statistics(
        self, device: torch.device | str, scale: float, replicas: int, following: int
    ) -> dict[str, dict[str, list[float | None]]]:
        if self._statistics is None:
            return {}
        measured = self._statistics.finish(device, scale, replicas)
        self._statistics.begin(following)
        return measured

    # ---------------------------------------------------------------- ranks

    def _over_ranks(self, mine: float, device: torch.device | str) -> tuple[float, list[float]]:
        """(mean loss, loss of each rank if all of them count); sets `raised` alike on every rank."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        raised = bool(self.flag and self.flag())
        row = torch.tensor(
            [mine if self.counts else 0.0, float(self.counts), float(raised)], dtype=torch.float64
        ).to(device)
        rows = [row]
        if ranks > 1:
            # Moved and added here, in rank order: not every library adds float64.
            rows = [torch.empty_like(row) for _ in range(ranks)]
            dist.all_gather(rows, row)
        losses, counted, flags = zip(*(row.tolist() for row in rows), strict=True)
        self.raised = math.fsum(flags) > 0
        own = list(losses) if all(counted) else []
        return _sum(losses) / math.fsum(counted), own

    # ---------------------------------------------------------------- the file

    def _open(self, world_size: int, device: torch.device | str) -> None:
        """Prepare the file; its header is written just before the first step: the engine may have loaded a checkpoint
        before."""
        environment = describe(device)

        def header(from_step: int) -> dict[str, Any]:
            return {
                "type": "header",
                "version": VERSION,
                "xtrain": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": platform.machine(),
                "world_size": world_size,
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "from_step": from_step,
                "modules_every": self.modules_every,
                "environment": environment,
                **self.header,
            }

        self._file = RecordFile(self.path, header)

    def _write(
        self,
        step: int,
        loss: float,
        by_rank: list[float],
        more: dict[str, Any],
        measured: dict[str, dict[str, list[float | None]]],
    ) -> None:
        """The lines of a step: its own, and those of the modules."""
        assert self._file is not None
        now = time.perf_counter()
        line: dict[str, Any] = {
            "type": "step",
            "step": step,
            "loss": loss,
            "loss_hex": loss.hex(),
            **more,
            "seconds": now - self._last,
            "elapsed": now - self._start,
        }
        if 1 < len(by_rank) <= MOST_RANKS:
            line["loss_by_rank"] = by_rank
        self._last = now
        lines, named = [line], self._named and not self._file.needs_header
        if measured and self._statistics is not None and not named:
            lines.append({"type": "names", "modules": self._statistics.names})
            named = True
        for phase, statistics in measured.items():
            lines.append({"type": "modules", "step": step, "phase": phase, **statistics})
        self._named = self._file.append(step, lines) and named

    def close(self) -> None:
        """Close the file and remove hooks from the model."""
        if self._statistics is not None:
            self._statistics.detach()
            self._statistics = None
        if self._file is not None:
            self._file.close()
            self._file = None


def _sum(values: Iterable[float]) -> float:
    values = list(values)
    # fsum refuses a mixture of infinities.
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
