"""The files of a checkpoint among other files: their mode, full disks, links, and names."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import xtrain
from tests import training
from xtrain.base.errors import CheckpointError, ConfigError
from xtrain.checkpoint import contents, find_tag, write

Ranks = Callable[..., list[Any]]


def _engine(stage: int = 1) -> Any:
    model = training.build_model()
    return xtrain.initialize(model=model, config=training.config(stage))[0]


def _with_umask(folder: str, umask: int, stage: int) -> None:
    before = os.umask(umask)
    try:
        _engine(stage).save_checkpoint(folder, "here")
    finally:
        os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_files_have_the_mode_that_the_umask_asks_for(ranks: Ranks, tmp_path: Path, umask: int) -> None:
    ranks(2, _with_umask, str(tmp_path), umask, 3)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 9
    for path in files:
        extra = 0o111 if path.name == "zero_to_fp32.py" else 0
        assert stat.S_IMODE(path.stat().st_mode) & ~0o111 == 0o666 & ~umask, path
        assert bool(stat.S_IMODE(path.stat().st_mode) & 0o100) == bool(extra), path


class _FullDisk:
    """Raises what a full disk does, on the n-th call of a function of the writer; earlier calls go through."""

    def __init__(self, name: str, call: int) -> None:
        self.name, self.call, self.real = name, call, getattr(write, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.call -= 1
        if self.call:
            return self.real(*arguments, **named)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[-1]))

    def __enter__(self) -> None:
        setattr(write, self.name, self)

    def __exit__(self, *_: object) -> None:
        setattr(write, self.name, self.real)


FULL = [
    ("save_file", 1),
    ("save_file", 2),
    ("safe_save", 1),
    ("safe_save", 2),
    ("write_text", 1),
    ("write_text", 2),
]


def _fill_the_disk(folder: str, name: str, call: int) -> str:
    engine = _engine()
    engine.save_checkpoint(folder, "same")
    training.engine_step(engine, 0)
    error = ""
    with _FullDisk(name, call):
        try:
            engine.save_checkpoint(folder, "same")
        except CheckpointError as caught:
            error = str(caught)
    training.engine_step(engine, 1)
    engine.save_checkpoint(folder, "after")
    return error


@pytest.mark.parametrize(("name", "call"), FULL)
def test_a_full_disk_leaves_what_there_was_and_nothing_else(
    ranks: Ranks, tmp_path: Path, name: str, call: int
) -> None:
    for said in ranks(2, _fill_the_disk, str(tmp_path), name, call):
        assert "No space left on device" in said
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["after", "latest", "same", "zero_to_fp32.py"]
    # Where only the writing of `latest` failed, the checkpoint itself is complete.
    new = (name, call) == ("write_text", 2)
    assert contents.read_manifest(tmp_path / "same")["global_steps"] == int(new)


def _rename_fails(folder: str) -> str:
    engine = _engine()
    engine.save_checkpoint(folder, "same")
    training.engine_step(engine, 0)
    real = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name == ".same.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return real(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(CheckpointError) as caught:
            engine.save_checkpoint(folder, "same")
    return str(caught.value)


def test_an_old_checkpoint_comes_back_when_it_cannot_be_replaced(ranks: Ranks, tmp_path: Path) -> None:
    assert "No space left" in ranks(2, _rename_fails, str(tmp_path))[0]
    assert contents.read_manifest(tmp_path / "same")["global_steps"] == 0
    assert not list(tmp_path.glob(".*"))


def _small_disk(folder: str) -> str:
    engine = _engine()
    with pytest.raises(CheckpointError) as caught:
        engine.save_checkpoint(folder, "here")
    return str(caught.value)


def test_a_disk_that_is_full(ranks: Ranks, tmp_path: Path) -> None:
    """The real thing, where one may mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=8k tmpfs {disk} 2>/dev/null"):
        pytest.skip("no right to mount a file system")
    try:
        for said in ranks(2, _small_disk, str(disk)):
            assert "No space left on device" in said or "failed" in said
        assert not list(disk.iterdir())
    finally:
        os.system(f"umount {disk}")


def _save_again(folder: str) -> None:
    engine = _engine()
    training.engine_step(engine, 0)
    engine.save_checkpoint(folder, "here")


@pytest.mark.parametrize("broken", [False, True])
def test_a_checkpoint_that_was_moved_and_linked_to(ranks: Ranks, tmp_path: Path, broken: bool) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    ranks(2, _with_umask, str(run), 0o022, 1)
    shutil.move(run / "here", elsewhere)
    (run / "here").symlink_to(elsewhere)
    if broken:
        shutil.rmtree(elsewhere)
    for _ in range(2):
        ranks(2, _save_again, str(run))
        assert contents.read_manifest(run / "here")["global_steps"] == 1
    assert not (run / "here").is_symlink()
    assert not list(run.glob(".*"))
    assert broken or contents.read_manifest(elsewhere)["global_steps"] == 0
    assert find_tag(run, None) == "here"


def _bad_places(folder: str) -> list[str]:
    engine = _engine()
    Path(folder, "file").write_text("mine")
    said = []
    for place, tag in (("", "t"), (None, "t"), (folder, "file"), (folder, "a/b"), (folder, "x" * 300)):
        with pytest.raises((ConfigError, CheckpointError)) as caught:
            engine.save_checkpoint(place, tag)
        said.append(f"{type(caught.value).__name__}: {caught.value}")
    return said


def test_places_that_cannot_be_saved_to(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for said in ranks(2, _bad_places, str(tmp_path)):
        assert said[0] == "ConfigError: save_dir must be the path of a folder, got ''"
        assert said[1] == "ConfigError: save_dir must be the path of a folder, got None"
        assert "file is a file: remove it, or choose another tag" in said[2]
        assert "must be a plain name" in said[3]
        assert "must be a plain name" in said[4]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
