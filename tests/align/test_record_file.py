"""A record on a full disk: training goes on, one warning says what is lost, and the file stays readable."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import training
from xtrain.align.record import read_record
from xtrain.align.recorder import Recorder


class Disk:
    """Lets the record's file grow to a number of bytes: what comes after is cut off, as on a real disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.room = path, 10**9
        self._write, self._truncate = os.write, os.ftruncate
        self.truncates = True

    def write(self, descriptor: int, data: bytes) -> int:
        if not self._is_ours(descriptor):
            return self._write(descriptor, data)
        left = self.room - os.fstat(descriptor).st_size
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(descriptor, data[:left])

    def truncate(self, descriptor: int, size: int) -> None:
        if self._is_ours(descriptor) and not self.truncates:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._truncate(descriptor, size)

    def _is_ours(self, descriptor: int) -> bool:
        return self.path.exists() and os.path.samestat(os.fstat(descriptor), self.path.stat())


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    it = Disk(tmp_path / "r.jsonl")
    monkeypatch.setattr(os, "write", it.write)
    monkeypatch.setattr(os, "ftruncate", it.truncate)
    return it


@pytest.mark.parametrize("truncates", [True, False])
def test_steps_that_do_not_fit_are_lost_and_named(
    disk: Disk, caplog: pytest.LogCaptureFixture, truncates: bool
) -> None:
    disk.truncates = truncates
    model = nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING), Recorder(disk.path, model=model, modules_every=1) as recorder:
        for step in range(1, 9):
            model(torch.ones(1, 2)).sum().backward()
            if step == 4:  # a part of the step's line still fits
                disk.room = disk.path.stat().st_size + 20
            if step == 6:
                disk.room = 10**9
            recorder.step(loss=1.0 / step)
            if truncates:
                assert disk.path.read_bytes().endswith(b"\n")
    record = read_record(disk.path)
    assert record.losses() == {step: 1.0 / step for step in (1, 2, 3, 6, 7, 8)}
    assert record.modules is not None
    assert record.modules.steps["forward"].tolist() == [1, 2, 3, 6, 7, 8]
    assert [header.get("lost_steps") for header in record.headers] == [None, [4, 5]]
    assert record.notes == ["steps 4 to 5 could not be written"]
    said = [entry.getMessage() for entry in caplog.records]
    assert len(said) == 2
    assert str(disk.path) in said[0]
    assert "(No space left on device): training goes on, but its losses from step 4 on are not" in said[0]
    assert "is written again from step 6 on: steps 4 to 5 are lost" in said[1]


def test_a_disk_that_is_full_from_the_start(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.room = 0
    with Recorder(disk.path) as recorder:
        for step in range(1, 4):
            disk.room = 10**9 if step == 3 else 30
            recorder.step(loss=0.5)
    assert read_record(disk.path).losses() == {3: 0.5}
    assert sum("cannot be written" in entry.getMessage() for entry in caplog.records) == 1


def test_a_path_that_cannot_be_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.step(loss=0.5)
        recorder.step(loss=0.5)
    assert [str(tmp_path) in entry.getMessage() for entry in caplog.records] == [True]


def _train(path: str, full: bool) -> list[float]:
    settings = training.config(1, xtrain={"record": path}, steps_per_print=10**9)
    if full:
        settings["csv_monitor"] = {"enabled": True, "output_path": f"{path}-csv", "job_name": "job"}
    engine = xtrain.initialize(model=training.build_model(), config=settings)[0]
    if full and engine.global_rank == 0:
        for name in ("Train_Samples_lr", "Train_Samples_train_loss"):
            Path(f"{path}-csv/job/{name}.csv").symlink_to("/dev/full")
    return [training.engine_step(engine, step) for step in range(3)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_training_goes_on(ranks: Any, tmp_path: Path) -> None:
    right = ranks(2, _train, str(tmp_path / "r.jsonl"), False)
    assert ranks(2, _train, "/dev/full", False) == right
    assert ranks(2, _train, str(tmp_path / "again.jsonl"), True) == right
    assert len(read_record(tmp_path / "again.jsonl").losses()) == 3
