"""What a `deepspeed` command line comes to, and what is refused before anything starts."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

import pytest

from xtrain import cli
from xtrain.base.errors import XtrainError
from xtrain.launch import devices
from xtrain.launch.deepspeed import binding, hosts
from xtrain.launch.deepspeed import command as deepspeed_command
from xtrain.launch.deepspeed import options as deepspeed_options
from xtrain.launch.deepspeed.invocation import Invocation
from xtrain.launch.devices import Devices
from xtrain.launch.nodes import Node


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a script and a hostfile, on a machine of one NUMA node."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "find", lambda: Devices("cpu", None))
    monkeypatch.setattr(devices, "host_ranks", lambda: 1)
    monkeypatch.setattr(deepspeed_command, "_is_taken", lambda port: port == 1234)
    for variable in ("CUDA_VISIBLE_DEVICES", "KMP_AFFINITY", "DS_ENV_FILE"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "train.py").touch()
    (tmp_path / "hosts").write_text("a slots=2\nb slots=4\n")
    return tmp_path


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find", lambda: Devices("cuda", 8, ("CUDA_VISIBLE_DEVICES",)))


def _make(*given: str) -> Invocation:
    return deepspeed_command.make_invocation(deepspeed_options.parse(given))


def _refused(*given: str) -> str:
    with pytest.raises(XtrainError) as caught:
        _make(*given)
    return str(caught.value)


# ---------------------------------------------------------------- the script and its arguments


def test_a_rank_runs_the_script_with_its_local_rank_first() -> None:
    made = _make("--num_gpus", "2", "train.py", "--num_gpus", "9", "--", "-x", "{local_rank}")
    assert made.command(1) == [
        sys.executable, "-u", "train.py", "--local_rank=1", "--num_gpus", "9", "--", "-x", "{local_rank}"
    ]  # fmt: skip
    assert made.here
    assert made.nodes == (Node("localhost", 2),)
    assert made.environment(0, 1) == {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "CROSS_RANK": "0", "CROSS_SIZE": "1", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip


@pytest.mark.parametrize("after", [["--", "x"], ["--"], ["x", "--", "y", "--"], ["--", "--"], []])
def test_what_follows_the_script_stays_as_it_is(after: list[str]) -> None:
    assert list(_make("--module", "json", *after).arguments) == after
    assert list(_make("-q", "train.py", *after).arguments) == after


def test_other_ways_to_run() -> None:
    assert _make("--no_python", "--no_local_rank", "sh", "-c", "x").command(0) == ["sh", "-c", "x"]
    assert _make("--module", "json.tool").command(0) == [
        sys.executable, "-u", "-m", "json.tool", "--local_rank=0"
    ]  # fmt: skip
    assert "no script 'trian.py'" in _refused("trian.py")
    assert "no program 'nothing_here'" in _refused("--no_python", "nothing_here")
    assert "no module 'nothing_here'" in _refused("--module", "nothing_here.x")
    assert "both given" in _refused("--module", "--no_python", "sh")


def test_an_invocation_travels_as_text() -> None:
    made = _make("-H", "hosts", "--elastic_training", "--master_addr", "a", "train.py", "ü", "$$ ${x}")
    assert Invocation.decode(made.encode()) == made
    assert made.encode().replace("-", "").replace("_", "").rstrip("=").isalnum()


# ---------------------------------------------------------------- this machine


def test_a_host_has_as_many_slots_as_somebody_asks_for() -> None:
    assert _make("train.py").nodes == (Node("localhost", 1),)
    assert _make("--include", "localhost:0,3", "train.py").nodes == (Node("localhost", 2),)
    assert "no slot is left" in _refused("--exclude", "localhost", "train.py")
    assert "unknown host 'worker-0'" in _refused("-i", "worker-0:1", "train.py")
    assert "--num_nodes=2: there is no hostfile" in _refused("--num_nodes", "2", "train.py")


def test_devices_have_numbers(eight_gpus: None) -> None:
    assert _make("train.py").nodes[0].devices == tuple(range(8))
    made = _make("-e", "localhost:0,1,2,3,4,5", "train.py")
    assert made.nodes == (Node("localhost", 2, (6, 7)),)
    assert made.environment(0, 0)["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert _make("--num_gpus=3", "train.py").nodes[0].devices == (0, 1, 2)
    assert "--num_gpus=9: this machine has 8 (cuda)" in _refused("--num_gpus=9", "train.py")
    assert "has no slot 8" in _refused("-i", "localhost:8", "train.py")


def test_visible_devices_are_respected_unless_an_option_says_more(
    eight_gpus: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 4")
    assert _make("train.py").nodes[0].devices == (4, 5)
    with caplog.at_level(logging.WARNING, "xtrain"):
        assert _make("--num_gpus=1", "train.py").nodes[0].devices == (0,)
    assert "CUDA_VISIBLE_DEVICES is ignored" in caplog.text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937,GPU-a2b4")
    made = _make("train.py")
    assert made.nodes == (Node("localhost", 2),)
    assert "CUDA_VISIBLE_DEVICES" not in made.environment(0, 0)  # inherited


def test_a_port_that_is_taken_is_found_before_the_start() -> None:
    assert "port 1234 of this machine is taken" in _refused("--master_port=1234", "--num_gpus=2", "train.py")
    assert _make("--master_port=1234", "train.py").master_port == 1234  # a lone rank opens none
    assert "no port" in _refused("--master_port=0", "train.py")


def test_taken_ports_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        assert deepspeed_command._is_taken(port)
    assert not deepspeed_command._is_taken(port)


def test_binding_is_checked_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "physical_cores", lambda: [0, 1])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert _make("--bind_cores_to_rank", "--num_gpus=2", "train.py").bind_cores
    refused = _refused("--bind_cores_to_rank", "--num_gpus=3", "train.py")
    assert refused.startswith("2 cores cannot be divided over 3 ranks")


# ---------------------------------------------------------------- several hosts


def test_a_hostfile_gives_the_nodes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    made = _make(
        "-H", "hosts", "--launcher", "SLURM", "--launcher_args", "--qos 'a b'", "--ssh_port=3", "train.py"
    )
    assert made.nodes == (Node("a", 2, (0, 1)), Node("b", 4, (0, 1, 2, 3)))
    assert not made.here
    assert made.master_addr is None
    assert (made.launcher, made.launcher_args, made.ssh_port) == ("slurm", ("--qos", "a b"), 3)
    assert made.exports["NCCL_DEBUG"] == "INFO"
    assert made.exports["PYTHONPATH"].startswith(str(folder))
    assert _make("-H", "hosts", "--num_gpus=3", "train.py").nodes[0] == Node("a", 3, (0, 1, 2))
    assert not _make("-H", "hosts", "--num_nodes=1", "--force_multi", "train.py").here
    assert _refused("-H", "hosts", "--num_nodes=3", "train.py").endswith("hosts has 2 hosts")


def test_a_single_host_is_this_machine(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "xtrain"):
        made = _make("-H", "hosts", "-i", "b:3", "train.py")
    assert made.here
    assert made.nodes == (Node("localhost", 1, (3,)),)
    assert made.master_addr == "127.0.0.1"
    assert "--force_multi runs them on b" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "xtrain"):
        _make("-H", "no_such_file", "train.py")
    assert "there is no hostfile no_such_file" in caplog.text


def test_without_ssh_each_host_starts_its_own() -> None:
    made = _make("-H", "hosts", "--no_ssh", "--node_rank=1", "train.py")
    assert made.here
    assert made.node_rank == 1
    assert made.environment(1, 2)["RANK"] == "4"
    assert made.environment(1, 2)["WORLD_SIZE"] == "6"
    assert made.environment(1, 2)["MASTER_ADDR"] == "a"
    assert _make(
        "-H", "hosts", "--no_ssh", "--node_rank=0", "--master_addr=1.2.3.4", "train.py"
    ).master_addr == ("1.2.3.4")
    assert "--node_rank=0 to 1" in _refused("-H", "hosts", "--no_ssh", "train.py")


# ---------------------------------------------------------------- the other options


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--autotuning", "run"], "--autotuning is not there yet"),
        (["--num_gpus=1", "-i", "localhost"], "cannot be given with --include"),
        (["--num_gpus=0"], "at least one is needed"),
        (["--launcher", "ssh"], "unknown launcher 'ssh'"),
        (["--launcher", "pdhs"], "did you mean 'pdsh'"),
        (["--launcher_args", "'"], "cannot be read"),
        (["--elastic_training", "--no_local_rank"], "gives no --local_rank anyway"),
        (["--elastic_training", "--no_ssh"], "not there yet"),
        (["--elastic_training", "--min_elastic_nodes=2"], "there are not so many hosts"),
        (
            ["-H", "hosts", "--elastic_training", "--min_elastic_nodes=2", "--max_elastic_nodes=1"],
            "no more than the most",
        ),
        (["--max_elastic_nodes=2"], "with --elastic_training only"),
        (["--enable_each_rank_log", "train.py"], "cannot be made"),
    ],
)
def test_options_that_are_wrong(given: list[str], sentence: str) -> None:
    assert sentence in _refused(*given, "train.py")


def test_the_remaining_options(folder: Path) -> None:
    made = _make(
        "--save_pid", "--enable_each_rank_log", "logs/here", "-q", "--elastic_training", "train.py", "x"
    )
    assert made.pid_file == f"/tmp/{os.getpid()}.deepspeed"
    assert made.rank_logs is not None
    assert Path(made.rank_logs).parent == folder / "logs" / "here"
    assert made.log_level == "error"
    assert made.elastic == (1, 1)
    assert made.command(0)[-2:] == ["train.py", "x"]  # DeepSpeed's elastic ranks get no --local_rank


def test_the_command_line_is_handed_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(deepspeed_command, "run_local", lambda made: seen.append(made.command(0)) or 7)
    assert cli.main(["deepspeed", "train.py", "--debug", "--", "-q", "--"]) == 7
    assert seen[0][2:] == ["train.py", "--local_rank=0", "--debug", "--", "-q", "--"]
    assert cli.main(["deepspeed", "trian.py"]) == 2
    assert capsys.readouterr().err.startswith("xtrain: error: there is no script 'trian.py'")
    monkeypatch.setattr(hosts, "launch_on_nodes", lambda made: seen.append([n.name for n in made.nodes]) or 5)
    assert cli.main(["deepspeed", "-H", "hosts", "train.py"]) == 5
    assert seen[-1] == ["a", "b"]


def test_options_without_a_use_here_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "xtrain"):
        _make("--venv_script", "x.sh", "--ssh_port=22", "--bind_core_list", "0", "--node_rank=0", "train.py")
    for name in (
        "--ssh_port and --venv_script: nothing is done",
        "--bind_core_list does nothing",
        "--node_rank does",
    ):
        assert name in caplog.text
