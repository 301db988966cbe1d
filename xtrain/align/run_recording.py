"""What an engine does when `xtrain launch` started it: record the run, and stop when asked.

The launcher sets XTRAIN_RUN_DIR. The engine then appends to `metrics.jsonl` in it, and when a file
`stop` appears there (Ctrl-C in the launcher, or an operator's `touch`), or any rank gets SIGTERM or
SIGHUP, all ranks save a checkpoint at the same step boundary and leave. A script's second engine gets
`metrics-1.jsonl` and `checkpoint/engine1`, and so on; all of them are saved at the stop.
"""

from __future__ import annotations

import functools
import os
import weakref
from pathlib import Path
from typing import Any

from xtrain import comm
from xtrain.align.recorder import Recorder
from xtrain.backends import Backend, EmulatingBackend
from xtrain.base import heartbeat
from xtrain.base.errors import ConfigError, RunInterrupted
from xtrain.base.run_folder import CHECKPOINTS, METRICS, RUN_DIR_VARIABLE, STOP, STOPPED
from xtrain.config import XtrainConfig
from xtrain.config.schema import RecordConfig
from xtrain.engine import leave_on_signal
from xtrain.engine.hooks import Hooks

_engines: list[weakref.ref[Any]] = []
"""Every engine of this process that was started in a run folder, in order of creation."""


def _save_all(run_dir: Path) -> None:
    for number, reference in enumerate(_engines):
        engine = reference()
        if engine is not None:
            folder = run_dir / CHECKPOINTS
            engine.save_checkpoint(str(folder / f"engine{number}" if number else folder))


def _asked_to_stop(run_dir: Path) -> bool:
    """Whether the stop file is there, for which rank 0 looks, or a signal came to this rank."""
    return leave_on_signal.came() or (comm.get_rank() == 0 and (run_dir / STOP).exists())


def _modelled(backend: Backend) -> dict[str, Any]:
    """What the emulated chip would have taken since the last step, for a line of the record."""
    times = backend.take_times() if isinstance(backend, EmulatingBackend) else None
    return {} if times is None else {"modelled": times}


def attach(
    engine: Any, config: XtrainConfig, backend: Backend, who: dict[str, str], counts: bool = True
) -> None:
    """Attach a recorder when the config or the launcher asks for one, and the stop file's watcher.

    Args:
        engine: xtrain's own or DeepSpeed's.
        who: goes into the record's header: which engine it is.
        counts: whether this rank's loss counts in the recorded mean.
    """
    section = config.values.xtrain
    run_dir = Path(os.environ[RUN_DIR_VARIABLE]) if RUN_DIR_VARIABLE in os.environ else None
    number = len(_engines)
    if run_dir is not None:
        _engines.append(weakref.ref(engine))
        leave_on_signal.raise_flag_in(run_dir)
    metrics = METRICS.replace(".", f"-{number}.") if number else METRICS
    record = section.record or RecordConfig()
    path = Path(record.path) if record.path else run_dir / metrics if run_dir else None
    if path is None:
        if section.record is not None:
            raise ConfigError('"xtrain": {"record": {...}} has no path: add one, or start with xtrain launch')
        return
    emulated = {"emulated": backend.describe()} if isinstance(backend, EmulatingBackend) else {}
    recorder = Recorder(
        path,
        header={**who, "backend": backend.name, **emulated, "config": config.public()},
        tokens_per_sample=section.tokens_per_sample,
        flag=functools.partial(_asked_to_stop, run_dir) if run_dir else None,
        counts=counts,
        modules_every=record.modules_every,
        modules=record.modules,
        more=lambda: _modelled(backend),
    )

    def stop_if_asked(engine: Any) -> None:
        heartbeat.beat(engine.global_steps)
        if recorder.raised and run_dir is not None:
            leave_on_signal.has_left()
            _save_all(run_dir)
            if engine.global_rank == 0:
                (run_dir / STOPPED).touch()
            raise RunInterrupted(f"stopped after step {engine.global_steps}")

    if isinstance(hooks := getattr(engine, "train_hooks", None), Hooks):
        hooks.before_forward.append(lambda *_: heartbeat.beat())
    recorder.attach(engine, after_step=stop_if_asked)
