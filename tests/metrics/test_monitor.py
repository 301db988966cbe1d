"""Monitors: what is on disk after training, next to real DeepSpeed's files, and the calls to hosted services."""

from __future__ import annotations

import csv
import json
import logging
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import xtrain
from tests import training
from tests.live_deepspeed import live_deepspeed
from xtrain.base.errors import ConfigError
from xtrain.config import load_config
from xtrain.config.schema import Config
from xtrain.monitor.comet import EventsLogScheduler
from xtrain.monitor.config import get_monitor_config
from xtrain.monitor.monitor import MonitorMaster

TIMES = {
    f"elapsed_time_ms_{phase}"
    for phase in ("forward", "backward", "backward_inner", "backward_allreduce", "step")
}


def _read(folder: Path) -> dict[str, list[list[str]]]:
    return {path.stem: list(csv.reader(path.open(newline=""))) for path in sorted(folder.glob("*.csv"))}


def _train(
    stage: int, section: dict[str, Any], steps: int = 3, **more: Any
) -> list[tuple[list[float], float]]:
    """Per step: the losses of this rank's micro-batches, the rate after it."""
    settings = training.config(stage, micro=4, csv_monitor=section, **more)
    engine = xtrain.initialize(model=training.build_model(), config=settings)[0]
    seen = []
    for step in range(steps):
        x, y = training.samples(step)
        losses = []
        for index in range(2):
            first = (engine.grid.rank * 2 + index) * 4
            loss = training.loss_of(engine, x[first : first + 4], y[first : first + 4])
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        seen.append((losses, engine.get_lr()[0]))
    with torch.no_grad():
        engine(x[:4].float())  # an evaluation is not measured
    assert engine.monitor.enabled is bool(section.get("enabled"))
    assert (engine.monitor.csv_monitor is not None) is (engine.global_rank == 0 and engine.monitor.enabled)
    engine.monitor.write_events([("Mine/a b", torch.tensor(0.5), 7)])
    engine.destroy()
    engine.monitor.write_events([("Mine/late", 1.0, 8)])
    return seen


@pytest.mark.parametrize("stage", [0, 3])
def test_csv_files_hold_rank_0s_curve(ranks: Any, tmp_path: Path, stage: int) -> None:
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    expected = ranks(2, _train, stage, section)[0]
    found = _read(tmp_path / "job")
    assert found.keys() == {"Train_Samples_lr", "Train_Samples_train_loss", "Mine_a_b"}
    assert found["Mine_a_b"] == [["step", "a b"], ["7", "0.5"]]
    header, *rows = found["Train_Samples_train_loss"]
    assert header == ["step", "train_loss"]
    assert [int(samples) for samples, _ in rows] == [16, 32, 48]
    assert [float(loss) for _, loss in rows] == pytest.approx(
        [sum(losses) / 2 for losses, _ in expected], rel=1e-6
    )
    header, *rows = found["Train_Samples_lr"]
    assert header == ["step", "lr"]
    assert [(int(samples), float(rate)) for samples, rate in rows] == [
        (16 * (step + 1), rate) for step, (_, rate) in enumerate(expected)
    ]


def test_a_resumed_run_continues_the_files(ranks: Any, tmp_path: Path) -> None:
    section = {"enabled": True, "output_path": str(tmp_path)}
    for _ in range(2):
        ranks(1, _single, section)
    rows = _read(tmp_path / "DeepSpeedJobName")["Train_Samples_lr"]
    assert [row[0] for row in rows] == ["step", "8", "8"]


def _single(section: dict[str, Any], **more: Any) -> list[str]:
    settings = {"train_batch_size": 8, "csv_monitor": section, **more}
    settings["optimizer"] = {"type": "SGD", "params": {"lr": 0.5}}
    engine = xtrain.initialize(model=training.build_model(), config=settings)[0]
    x, y = training.samples(0)
    engine.backward(training.loss_of(engine, x[:8], y[:8]))
    engine.step()
    return list(engine.get_wall_clock_timers())


def test_loss_scale_and_times_have_tags_of_their_own(ranks: Any, tmp_path: Path) -> None:
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": ""}
    fp16 = {"enabled": True, "loss_scale": 64}
    timers = ranks(1, _single_with, section, {"fp16": fp16, "wall_clock_breakdown": True})[0]
    found = _read(tmp_path)
    assert found["Train_Samples_loss_scale"] == [["step", "loss_scale"], ["8", "64.0"]]
    assert {name.removeprefix("Train_Samples_") for name in found} == TIMES | {
        "lr",
        "train_loss",
        "loss_scale",
    }
    assert all(float(found[f"Train_Samples_{name}"][1][1]) >= 0 for name in TIMES)
    assert float(found["Train_Samples_elapsed_time_ms_step"][1][1]) > 0
    assert len(timers) == 10


def _single_with(section: dict[str, Any], more: dict[str, Any]) -> list[str]:
    return _single(section, **more)


def _both(folder: str) -> None:
    for name in ("ours", "theirs"):
        settings = {
            "train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "wall_clock_breakdown": True,
            "csv_monitor": {"enabled": True, "output_path": folder, "job_name": name},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 0.01}},
        }
        if name == "ours":
            _steps(xtrain.initialize(model=training.build_model(), config=settings)[0])
        else:
            with live_deepspeed() as deepspeed:
                model = training.build_model()
                parameters = list(model.parameters())
                _steps(deepspeed.initialize(model=model, model_parameters=parameters, config=settings)[0])


def _steps(engine: Any) -> None:
    for step in range(3):
        x, y = training.samples(step)
        for first in (0, 4):
            engine.backward(training.loss_of(engine, x[first : first + 4], y[first : first + 4]))
            engine.step()


@pytest.mark.deepspeed
def test_files_are_those_of_deepspeed(ranks: Any, tmp_path: Path) -> None:
    """DeepSpeed 0.19 writes train_loss in its pipeline engine only."""
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    ranks(1, _both, str(tmp_path))
    ours, theirs = _read(tmp_path / "ours"), _read(tmp_path / "theirs")
    assert ours.keys() - theirs.keys() == {"Train_Samples_train_loss"}
    assert theirs.keys() - ours.keys() == set()
    assert {name.removeprefix("Train_Samples_") for name in theirs} == {"lr", *TIMES}
    for name, rows in theirs.items():
        assert [row[0] for row in rows] == [row[0] for row in ours[name]], name
        assert rows[0] == ours[name][0]
    for mine, expected in zip(ours["Train_Samples_lr"][1:], theirs["Train_Samples_lr"][1:], strict=True):
        assert float(mine[1]) == pytest.approx(float(expected[1]), rel=1e-12)
    path = "Train_Samples_lr.csv"
    newline = (tmp_path / "theirs" / path).read_bytes().count(b"\r\n")
    assert (tmp_path / "ours" / path).read_bytes().count(b"\r\n") == newline == 4


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("section", "name"),
    [("tensorboard", "TensorBoardConfig"), ("wandb", "WandbConfig"), ("csv_monitor", "CSVConfig"),
     ("comet", "CometConfig"), ("comms_logger", "CommsLoggerConfig"),
     ("timers.throughput", "DeepSpeedThroughputTimerConfig"), ("flops_profiler", "DeepSpeedFlopsProfilerConfig")],
)  # fmt: skip
def test_keys_and_defaults_are_deepspeeds(section: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    import deepspeed.comm.config
    import deepspeed.monitor.config
    import deepspeed.profiling.config
    import deepspeed.utils.config

    modules = (
        deepspeed.monitor.config,
        deepspeed.comm.config,
        deepspeed.utils.config,
        deepspeed.profiling.config,
    )
    cls = next(getattr(module, name) for module in modules if hasattr(module, name))
    theirs = vars(cls({})) if section == "flops_profiler" else cls().model_dump()
    ours: Any = Config()
    for part in section.split("."):
        ours = getattr(ours, part)
    assert ours.model_dump() == theirs


def _without(package: str, section: str) -> str:
    if xtrain.comm.get_rank() == 0:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        xtrain.initialize(
            model=training.build_model(), config={"train_batch_size": 8, section: {"enabled": True}}
        )
    except ConfigError as error:
        return str(error)
    finally:
        sys.modules.pop(package, None)
    return ""


@pytest.mark.parametrize(
    ("package", "section"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet_ml", "comet")]
)
def test_a_missing_package_is_named_on_every_rank(ranks: Any, package: str, section: str) -> None:
    for said in ranks(2, _without, package, section):
        assert said.startswith(f"config key '{section}.enabled' is true, but the package {package!r} is not")
        assert "pip install" in said
        assert "\n" not in said


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    section = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path / "file")}}
    with pytest.raises(OSError, match="file"):
        MonitorMaster(get_monitor_config(section))


class _Wandb(SimpleNamespace):
    run = None

    def __init__(self) -> None:
        super().__init__(calls=[])

    def init(self, **kwargs: Any) -> None:
        self.calls.append(("init", kwargs))

    def log(self, data: dict[str, Any], **kwargs: Any) -> None:
        self.calls.append((data, kwargs))

    def finish(self) -> None:
        self.calls.append("finish")


def test_wandb_gets_runs_and_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = {"wandb": {"enabled": True, "group": "g", "team": "t", "project": "p"}}
    monitor = MonitorMaster(get_monitor_config(config))
    monitor.write_events([("a", torch.tensor([2.5]), 16), ("b", 3, 16)])
    monitor.close()
    assert fake.calls == [
        ("init", {"project": "p", "group": "g", "entity": "t"}),
        ({"a": 2.5}, {"step": 16, "commit": None}),
        ({"b": 3}, {"step": 16, "commit": None}),
        "finish",
    ]


class _Comet(SimpleNamespace):
    __version__ = "3.0"

    def __init__(self) -> None:
        super().__init__(calls=[])

    def _start(self, **kwargs: Any) -> Any:
        self.calls.append(kwargs)
        return self

    def set_name(self, name: str) -> None:
        self.calls.append(name)

    def log_metric(self, name: str, value: Any, step: int) -> None:
        self.calls.append((name, value, step))

    def end(self) -> None:
        self.calls.append("end")


def test_comet_gets_every_hundredth_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _Comet()
    monkeypatch.setitem(sys.modules, "comet_ml", fake)
    config = {"comet": {"enabled": True, "api_key": "secret", "experiment_name": "e", "mode": "create"}}
    with pytest.raises(ConfigError, match=r"comet_ml 3.0 has no start\(\)"):
        MonitorMaster(get_monitor_config(config))
    fake.start = fake._start
    monitor = MonitorMaster(get_monitor_config(config))
    for samples in range(40, 400, 40):
        monitor.write_events([("a", 1.0, samples)])
    monitor.close()
    start, name, *metrics, end = fake.calls
    assert start == {"api_key": "secret", "project": None, "workspace": None, "experiment_key": None,
                     "mode": "create", "online": None}  # fmt: skip
    assert (name, end) == ("e", "end")
    assert metrics == [("a", 1.0, samples) for samples in (40, 160, 280)]


@given(st.integers(0, 50), st.lists(st.integers(1, 30), max_size=30))
def test_values_submitted_are_an_interval_apart(interval: int, gaps: list[int]) -> None:
    scheduler, samples, submitted = EventsLogScheduler(interval), 0, []
    for gap in gaps:
        samples += gap
        if scheduler.needs_logging("a", samples):
            submitted.append(samples)
    assert submitted[:1] == gaps[:1]
    assert all(b - a >= interval for a, b in pairwise(submitted))
    assert all(b - a < interval + 30 for a, b in pairwise(submitted))


def test_a_key_to_comet_is_not_written_anywhere(caplog: pytest.LogCaptureFixture) -> None:
    config = {"train_batch_size": 8, "comet": {"enabled": True, "api_key": "secret"}}
    caplog.set_level(logging.INFO, logger="xtrain")
    xtrain.DeepSpeedConfig(config).print("config")
    assert "comet" in caplog.text
    assert "secret" not in caplog.text
    checked = load_config(config)
    assert "secret" not in json.dumps(checked.public())
    assert "secret" not in checked.values.model_dump_json()
    assert checked.raw["comet"]["api_key"] == "secret"


def test_tensorboard_reads_the_scalars_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra monitor")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    monitor = MonitorMaster(get_monitor_config({"tensorboard": section}))
    values = [0.1 * step for step in range(5)]
    for step, value in enumerate(values):
        monitor.write_events(
            [("Train/Samples/lr", value, 16 * step), ("Train/Samples/train_loss", -value, step)]
        )
    before_close = EventAccumulator(str(tmp_path / "job"))
    before_close.Reload()
    monitor.close()
    assert sorted(before_close.Tags()["scalars"]) == ["Train/Samples/lr", "Train/Samples/train_loss"]
    rates = before_close.Scalars("Train/Samples/lr")
    assert [event.step for event in rates] == [0, 16, 32, 48, 64]
    assert [event.value for event in rates] == torch.tensor(values).tolist()
