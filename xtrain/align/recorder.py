"""Writes the run record while a DeepSpeed-like engine trains.

Works on any engine with DeepSpeed's methods (xtrain's own or the real one): it wraps `backward` and
`step` (or `train_batch`) of the instance and asks nothing that is not public.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from xtrain.align.record import VERSION
from xtrain.version import __version__


def _loss_scale(engine: Any) -> float | None:
    """The scale of the gradients that the next step applies. DeepSpeed's engine.loss_scale() is the config's."""
    optimizer = getattr(engine, "optimizer", None)
    scale = getattr(optimizer, "cur_scale", getattr(optimizer, "loss_scale", None))
    return None if scale is None else float(scale)


class Recorder:
    """Records loss, gradient norm, learning rate, loss scale, tokens and time of each optimizer step.

    The loss of a step is the mean over micro-batches and over ranks with (parts of) samples of their own, added up
    in float64.

    Args:
        path: the record; lines are appended.
        header: facts about the run that go into the header line.
        tokens_per_sample: with it, every line says how many tokens the step consumed.
        flag: asked once per step on rank 0; the answer reaches all ranks in the same collective as the
            loss (see `raised`).
        counts: whether this rank's losses are in the mean: not where another has the same, or where a pipeline
            stage that is not the last has none.
        more: asked once per step for further keys of its line.
    """

    def __init__(
        self,
        path: str | Path,
        header: dict[str, Any] | None = None,
        tokens_per_sample: int | None = None,
        flag: Callable[[], bool] | None = None,
        counts: bool = True,
        more: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self.path = Path(path)
        self.header = header or {}
        self.tokens_per_sample = tokens_per_sample
        self.flag = flag
        self.counts = counts
        self.more = more
        self.raised = False
        """Whether `flag` answered True on rank 0 at the last step; the same on every rank."""
        self._losses: list[torch.Tensor] = []
        self._file: IO[str] | None = None
        self._start = self._last = 0.0

    def attach(self, engine: Any, after_step: Callable[[Any], None] | None = None) -> None:
        """Record every step of `engine` from now on; call `after_step(engine)` after each line."""
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
                self._write_step(engine, lr, scale)
                if after_step is not None:
                    after_step(engine)
            return result

        # Instance attributes; nn.Module keeps functions apart from parameters and modules.
        if callable(train_batch := getattr(engine, "train_batch", None)):
            engine.train_batch = self._recorded_train_batch(engine, train_batch, after_step)
        else:
            engine.backward, engine.step = recorded_backward, recorded_step
        self._start = self._last = time.perf_counter()

    def _recorded_train_batch(
        self, engine: Any, train_batch: Callable[..., Any], after_step: Callable[[Any], None] | None
    ) -> Callable[..., Any]:
        """For DeepSpeed's pipeline engine, whose one call is a step and returns the mean loss on every rank."""

        @wraps(train_batch)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            lr, scale = list(engine.get_lr()), _loss_scale(engine)
            loss = train_batch(*args, **kwargs)
            self._losses.append(loss.detach().clone())
            self._write_step(engine, lr, scale)
            if after_step is not None:
                after_step(engine)
            return loss

        return recorded

    def _open(self, engine: Any) -> None:
        """Write the header, just before the first step: the engine may have loaded a checkpoint before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        self._file = self.path.open("a", encoding="utf-8")
        if cut_off and self.path.stat().st_size:
            self._file.write("\n")  # a crash cut the last line off; it must not swallow the header
        header = {
            "type": "header",
            "version": VERSION,
            "xtrain": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "world_size": engine.world_size,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "from_step": engine.global_steps - 1,
            **self.header,
        }
        self._write(header)

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, default=str) + "\n")
            self._file.flush()

    def _mean_loss(self, engine: Any) -> float:
        losses = [loss.reshape(()) for loss in self._losses] or [torch.tensor(float("nan"))]
        mean = torch.stack(losses).cpu().double().mean()  # float64 is the host's: not every device adds it
        self._losses.clear()
        raised = bool(self.flag and engine.global_rank == 0 and self.flag())
        mine = torch.tensor(
            [float(mean) if self.counts else 0.0, float(self.counts), float(raised)], dtype=torch.float64
        ).to(engine.device)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        rows = [mine]
        if ranks > 1:
            # Moved and added here, in rank order: not every library adds float64.
            rows = [torch.empty_like(mine) for _ in range(ranks)]
            dist.all_gather(rows, mine)
        loss, counted, flags = (
            math.fsum(column) for column in zip(*(row.tolist() for row in rows), strict=True)
        )
        self.raised = flags > 0
        return loss / counted

    def _write_step(self, engine: Any, lr: list[float], scale: float | None) -> None:
        loss = self._mean_loss(engine)
        now = time.perf_counter()
        norm = engine.get_global_grad_norm()
        line: dict[str, Any] = {
            "type": "step",
            "step": engine.global_steps,
            "loss": loss,
            "loss_hex": loss.hex(),
            "grad_norm": None if norm is None else float(norm),
            "lr": lr,
            "loss_scale": scale,
            "applied": bool(engine.was_step_applied()),
            "seconds": now - self._last,
            "elapsed": now - self._start,
        }
        if self.tokens_per_sample:
            line["tokens"] = engine.train_batch_size() * self.tokens_per_sample
        if self.more is not None:
            line |= self.more()
        self._last = now
        if engine.global_rank == 0:
            if self._file is None:
                self._open(engine)
            self._write(line)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
