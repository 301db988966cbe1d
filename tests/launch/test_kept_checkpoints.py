"""The checkpoints of a run as the launcher handles them, and whose settings it takes over: files alone, no ranks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from xtrain import cli
from xtrain.base.errors import CheckpointError, ConfigError
from xtrain.base.files import sha256
from xtrain.checkpoint.contents import FORMAT, VERSION, rng_file
from xtrain.launch import trust
from xtrain.launch.checkpoints import (
    Source,
    find_source,
    make_newest_whole,
    newest_tag,
    newest_whole,
    prune,
    usable,
)


def _checkpoints(folder: Path, *tags: str) -> Path:
    """Complete ones, the last one the newest."""
    for index, tag in enumerate(tags):
        (folder / tag).mkdir(parents=True)
        files = {}
        for name in ("model.safetensors", rng_file(0, 1)):
            file = folder / tag / name
            file.write_bytes(tag.encode())
            files[name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "ranks": 1,
            "parameters": {},
            "runs": {},
            "files": files,
        }
        (folder / tag / "manifest.json").write_text(json.dumps(manifest))
        os.utime(folder / tag / "manifest.json", (index, index))
        (folder / "latest").write_text(tag)
    return folder


def _damage(folder: Path, tag: str) -> None:
    file = folder / tag / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(bytes(content))


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_taken(tmp_path: Path) -> None:
    folder = _checkpoints(tmp_path / "checkpoint", "a", "b", "c")
    assert newest_whole(folder) == ("c", [])
    assert make_newest_whole(folder) == ("c", [])
    _damage(folder, "c")
    tag, damage = newest_whole(folder)
    assert tag == "b"
    assert len(damage) == 1
    assert str(folder / "c") in damage[0]
    assert newest_tag(folder) == "c"  # looking changes nothing
    assert make_newest_whole(folder)[0] == "b"
    assert newest_tag(folder) == "b"
    assert (folder / ".c.damaged-1" / "model.safetensors").exists()
    _checkpoints(folder, "c")
    _damage(folder, "c")
    make_newest_whole(folder)
    assert (folder / ".c.damaged-2").exists()
    _damage(folder, "a")
    _damage(folder, "b")
    tag, damage = make_newest_whole(folder)
    assert (tag, len(damage)) == (None, 2)
    assert newest_tag(folder) is None


def test_latest_counts_more_than_times(tmp_path: Path) -> None:
    folder = _checkpoints(tmp_path, "a", "b")
    (folder / "latest").write_text("a")
    assert newest_whole(folder)[0] == "a"
    (folder / "latest").write_bytes(b"\xff")  # unreadable: the newest complete one counts
    assert newest_whole(folder)[0] == "b"


def test_a_file_that_is_missing_is_damage(tmp_path: Path) -> None:
    folder = _checkpoints(tmp_path, "a", "b")
    (folder / "b" / "model.safetensors").unlink()
    assert newest_whole(folder)[0] == "a"
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        usable(Source(folder, "b"))
    assert usable(Source(folder))[0] == Source(folder, "a")


def test_pruning_keeps_the_newest_and_what_latest_names(tmp_path: Path) -> None:
    folder = _checkpoints(tmp_path, "a", "b", "c", "d")
    (folder / "latest").write_text("a")
    assert prune(folder, 2) == ["b"]
    assert sorted(path.name for path in folder.iterdir()) == ["a", "c", "d", "latest"]
    (folder / "latest").write_text("d")
    assert prune(folder, 2) == ["a"]
    assert prune(folder, 2) == []
    (folder / "latest").unlink()
    assert prune(folder, 1) == []  # which one counts is not known


def test_what_resume_names(tmp_path: Path) -> None:
    folder = _checkpoints(tmp_path / "run" / "checkpoint", "a", "b")
    for given in (tmp_path / "run", folder):
        assert find_source(str(given), tmp_path / "other") == Source(folder)
    assert find_source(str(folder / "a"), tmp_path) == Source(folder, "a")
    assert find_source("auto", tmp_path / "run") == Source(folder)
    assert find_source("auto", tmp_path / "other") is None
    assert find_source(None, tmp_path) is None


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder that somebody else has prepared."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    run_dir = tmp_path / "foreign"
    _checkpoints(run_dir / "checkpoint", "a")
    (run_dir / "overrides.json").write_text(
        json.dumps(["train.steps=9", f"+cluster.env.PYTHONPATH={tmp_path}", "script_args=[--x]"])
    )
    return run_dir


def test_a_foreign_run_folder_runs_no_code(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = f"+cluster.env.PYTHONPATH={tmp_path}"
    command = ["launch", "--dry-run", f"resume={foreign}", f"run_dir={tmp_path / 'run'}"]
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        f"xtrain: error: {foreign / 'overrides.json'} says {said}, which decides what is run"
    )
    assert err.count("\n") == 1
    assert cli.main([*command, said]) == 2  # the next one of them
    assert "says script_args=[--x]" in capsys.readouterr().err
    for trusting in ([said, "script_args=[--x]"], ["--trust"]):
        assert cli.main([*command, *trusting]) == 0
        out = capsys.readouterr().out
        assert f"PYTHONPATH={tmp_path}" in out
        assert "--steps=9" in out


def test_resume_auto_in_a_foreign_folder(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "--dry-run", "resume=auto", f"run_dir={foreign}"]) == 2
    assert "was not written by your launcher" in capsys.readouterr().err


@pytest.mark.parametrize(
    "code",
    ["cluster=slurm", "++cluster.python=/x", "script=/x.py", "backend=fake", "+deepspeed.xtrain.backend=x",
     "deepspeed_config=/x", "hydra.searchpath=[/x]", "cluster@cluster=x", "~cluster.env"],
)  # fmt: skip
def test_settings_that_run_code(foreign: Path, code: str) -> None:
    path = foreign / "overrides.json"
    with pytest.raises(ConfigError, match="was not written by your launcher"):
        trust.check_overrides(path, ["train.lr=1", code], [], trusted=False)
    trust.check_overrides(path, [code], [code], trusted=False)
    trust.check_overrides(path, ["train.lr=1", "model=glm_335m", "data.path=/x"], [], trusted=False)


def test_own_signature(foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = foreign / "overrides.json"
    trust.sign(foreign, [path.name])
    assert trust.is_own(path)
    assert (tmp_path / "home" / "xtrain" / "key").stat().st_mode & 0o77 == 0
    shutil.copytree(foreign, tmp_path / "copy")
    assert trust.is_own(tmp_path / "copy" / path.name)  # a copy says the same
    path.write_text(path.read_text().replace("9", "8"))
    assert not trust.is_own(path)
    (tmp_path / "copy" / trust.SIGNATURES).write_text('{"overrides.json": 5}')
    assert not trust.is_own(tmp_path / "copy" / path.name)
    trust.sign(foreign, [path.name])
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "somebody"))
    assert not trust.is_own(path)
