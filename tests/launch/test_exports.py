"""Variables for ranks on other machines."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from xtrain.base.errors import ConfigError
from xtrain.launch.deepspeed.exports import exports, read_environment_file


def test_names_are_taken_by_their_beginnings(tmp_path: Path) -> None:
    given = {
        "NCCL_DEBUG": "INFO", "UCX_TLS": "tcp", "HCCL_WHITELIST_DISABLE": "1", "PYTHONHASHSEED": "0", "HOME": "/h",
        "PATH": "/bin", "HIP_VISIBLE_DEVICES": "3", "WANDB_KEY": "k", "XTRAIN_RUN_DIR": "/r",
    }  # fmt: skip
    found = exports(given, tmp_path)
    assert set(found) == {"NCCL_DEBUG", "UCX_TLS", "HCCL_WHITELIST_DISABLE", "PYTHONHASHSEED", "PYTHONPATH"}
    assert found["PYTHONPATH"] == str(tmp_path)
    assert "WANDB_KEY" in exports(given, tmp_path, ["WANDB"])
    # CANN's set_env.sh sets paths as well.
    cann = exports({**given, "ASCEND_HOME_PATH": "/a", "PYTHONPATH": "/p"}, tmp_path)
    assert cann["PATH"] == "/bin"
    assert cann["PYTHONPATH"] == f"{tmp_path}:/p"


def test_some_nodes_have_values_of_their_own(tmp_path: Path) -> None:
    given = {"NCCL_IB_HCA": "mlx5_0", "NCCL_DEBUG": "INFO", "HOME": "/h"}
    assert "NCCL_IB_HCA" in exports(given, tmp_path)
    assert "NCCL_IB_HCA" not in exports({**given, "AISC_JOB_NAME": "j"}, tmp_path)


def test_the_environment_file_of_the_working_folder_wins(tmp_path: Path) -> None:
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    for folder, value in ((home, "home"), (cwd, "cwd")):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(f"A={value}\nB_{value}=1\n")
    found = exports({"HOME": str(home)}, cwd)
    assert (found["A"], found["B_home"], found["B_cwd"]) == ("cwd", "1", "1")
    (cwd / "other").write_text("C=1")
    found = exports({"HOME": str(home), "DS_ENV_FILE": str(cwd / "other")}, cwd)
    assert found["C"] == "1"
    assert "A" not in found


def test_lines_of_the_environment_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "env"
    file.write_text(
        "# comment\n\nA = x=y \nexport B=\"two words\"\nC='$HOME'\nD=/x:$LD:${LD}/z$\nE=$UNSET\nBASH_FUNC_f%%=()\n"
    )
    with caplog.at_level(logging.WARNING, "xtrain"):
        found = read_environment_file(file, {"LD": "/l", "HOME": "/h"})
    assert found == {"A": "x=y", "B": "two words", "C": "$HOME", "D": "/x:/l:/l/z$", "E": ""}
    assert "line 8" in caplog.text
    file.write_text("A=1\nB\n")
    with pytest.raises(ConfigError, match=r"env, line 2: 'B' is not of the form NAME=VALUE"):
        read_environment_file(file, {})
