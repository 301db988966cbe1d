"""`xtrain shims`: what is written, and that a program finds xtrain under the name deepspeed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from xtrain import cli
from xtrain.base.errors import ConfigError
from xtrain.base.missing import API_VERSION
from xtrain.launch.deepspeed import shims, ssh_all


def test_the_commands_are_deepspeeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my bin"
    assert cli.main(["shims", str(folder)]) == 0
    assert f"export PATH='{folder}':" in capsys.readouterr().out
    assert cli.main(["shims", str(folder)]) == 0  # a second time
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"deepspeed", "ds", "ds_report", "dsr", "ds_ssh", "ds_bench", "ds_io", "ds_nvme_tune"} <= names
    version = subprocess.run([folder / "deepspeed", "--help"], capture_output=True, text=True, check=True)
    assert "--include" in version.stdout
    refused = subprocess.run([folder / "ds_bench"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "ds_bench is not there in xtrain: `xtrain doctor` measures" in refused.stderr


def test_what_they_start_has_xtrains_names(tmp_path: Path) -> None:
    shims.write(tmp_path, {})
    lines = (tmp_path / "deepspeed").read_text().splitlines()[:-1]
    code = (
        "import deepspeed.launcher.runner as r, deepspeed, importlib.metadata as m; "
        "print(r.__name__, deepspeed.__version__, m.version('deepspeed'))"
    )

    def python(*arguments: str) -> str:
        (tmp_path / "python").write_text("\n".join([*lines, f'exec {sys.executable} "$@"']) + "\n")
        done = subprocess.run(["sh", tmp_path / "python", *arguments], capture_output=True, text=True)
        return done.stdout + done.stderr

    assert python("-c", code) == f"xtrain.launcher.runner {API_VERSION} {API_VERSION}\n"
    assert "--include" in python("-m", "deepspeed.launcher.runner", "--help")  # as debuggers start it


def test_other_peoples_commands_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "deepspeed").write_text("#!/usr/bin/env python3\n")
    with pytest.raises(ConfigError, match="not from xtrain"):
        shims.write(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["deepspeed"]
    with pytest.raises(ConfigError, match="cannot be written"):
        shims.write(tmp_path / "deepspeed" / "x", {})


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hostfile, and an ssh that runs everything here."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nHOST=$3\nexport HOST\nexec sh -c "$4"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    return tmp_path / "hosts"


def test_ds_ssh_runs_on_every_host(hosts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ssh_all.main(["-f", str(hosts), 'echo "I am $HOST" | cat; echo "  more" >&2']) == 0
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == ["a: I am a", "b: I am b"]
    assert sorted(err.splitlines()) == ["a:   more", "b:   more"]
    assert ssh_all.main(["-f", str(hosts), "echo", "two  blanks", "-n"]) == 0
    assert "a: two  blanks -n" in capsys.readouterr().out
    assert ssh_all.main(["-f", str(hosts), "test $HOST = a || exit 5"]) == 5
    assert "b: ended with status 5" in capsys.readouterr().err


def test_ds_ssh_says_what_it_needs(hosts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ssh_all.main(["-f", str(hosts)]) == 2
    assert ssh_all.main(["-f", str(hosts) + "x", "ls"]) == 2
    told = capsys.readouterr().err
    assert "ds_ssh needs a command" in told
    assert "there is no hostfile" in told
