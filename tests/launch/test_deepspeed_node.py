"""`python -m deepspeed.launcher.launch`: what its options come to."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from xtrain.base.errors import ConfigError
from xtrain.launch import devices
from xtrain.launch.deepspeed import command as deepspeed_command
from xtrain.launch.deepspeed import node as deepspeed_node
from xtrain.launch.devices import Devices
from xtrain.launch.nodes import Node
from xtrain.launcher import launch


def _encoded(world: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(world).encode()).decode()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "find", lambda: Devices("cuda", 8, ("CUDA_VISIBLE_DEVICES",)))
    monkeypatch.setattr(deepspeed_command, "_is_taken", lambda port: False)
    (tmp_path / "train.py").touch()
    return tmp_path


WORLD = f"--world_info={_encoded({'a': [0, 1], 'b': [4, 6, 7]})}"


def test_the_ranks_of_one_node() -> None:
    made = deepspeed_node.make_invocation(
        [WORLD, "--node_rank=1", "--master_addr=a", "--save_pid", "77", "train.py", "--", "-x"]
    )
    assert made.nodes == (Node("a", 2, (0, 1)), Node("b", 3, (4, 6, 7)))
    assert made.command(2) == [sys.executable, "-u", "train.py", "--local_rank=2", "--", "-x"]
    assert made.environment(1, 2)["RANK"] == "4"
    assert made.environment(1, 2)["CUDA_VISIBLE_DEVICES"] == "4,6,7"
    assert made.environment(1, 2)["MASTER_ADDR"] == "a"
    assert made.pid_file == "/tmp/77.deepspeed"
    assert made.rank_logs is None


@pytest.mark.parametrize(
    "world", ["x", "e30=", _encoded([0]), _encoded({"a": []}), _encoded({"a": 4}), _encoded({"a": ["x"]})]
)
def test_a_world_that_cannot_be_read(world: str) -> None:
    with pytest.raises(ConfigError, match="--world_info="):
        deepspeed_node.make_invocation([f"--world_info={world}", "train.py"])


def test_by_its_import_path(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(deepspeed_node, "run_local", lambda made: made.node_rank)
    monkeypatch.setattr(sys, "argv", ["launch", WORLD, "train.py"])
    assert launch.parse_args().user_script == "train.py"
    launch.main()
    for given, status in (("--node_rank=1", 1), ("--node_rank=2", 2)):
        monkeypatch.setattr(sys, "argv", ["launch", WORLD, given, "train.py"])
        with pytest.raises(SystemExit) as left:
            launch.main()
        assert left.value.code == status
    assert "has 2 hosts, numbered from 0" in capsys.readouterr().err
