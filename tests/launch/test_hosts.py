"""`xtrain launch cluster=hosts` by ssh on hosts with networks of their own: same bits, bad input, failures, signals."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.launch.conftest import STEPS, curve
from tests.launch.runs import finish, processes_of, rank_process, run, start, steps, wait_for
from tests.services.hosts import Hosts
from xtrain.checkpoint import is_checkpoint
from xtrain.launch.incidents import read_incidents

pytestmark = pytest.mark.services

ROOT = Path(__file__).resolve().parents[2]
Curve = list[tuple[int, float]]
WAITING = """
import time, torch
import xtrain as deepspeed
from xtrain.base.errors import RunInterrupted
deepspeed.init_distributed()
engine, *_ = deepspeed.initialize(model=torch.nn.Linear(4, 4), config={
    "train_batch_size": 4, "optimizer": {"type": "AdamW"}})
for step in range(100000):
    try:
        engine.backward(engine(torch.randn(2, 4)).square().mean())
        engine.step()
    except RunInterrupted:
        WHEN_SAVED
        raise
    print("step", step)
    AFTER_A_STEP
"""


def _args(hosts: Hosts, names: str = "a,b") -> list[str]:
    return ["cluster=hosts", f"cluster.hosts=[{names}]", f"cluster.ssh.args=[-F,{hosts.ssh_config}]"]


def _under_way(run_dir: Path, step: int = 25) -> None:
    """Until the run has a checkpoint, and steps after it."""
    wait_for(lambda: steps(run_dir) >= step and is_checkpoint(run_dir / "checkpoint"), seconds=120)


def _nothing_left(hosts: Hosts, run_dir: Path) -> None:
    """No rank anywhere, and on the hosts nothing but sshd."""
    wait_for(lambda: processes_of(run_dir) == [], seconds=20)
    for name in hosts.names:
        wait_for(lambda name=name: len(hosts.processes(name)) <= 1, seconds=20)  # type: ignore[misc]


def test_two_hosts_have_the_curve_of_one(
    hosts: Hosts, settings: list[str], undisturbed: Curve, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, *settings, *_args(hosts))
    wait_for(lambda: steps(run_dir) > 0, seconds=120)
    (ours,) = set(hosts.processes("b")) & set(processes_of(run_dir))
    assert ours == rank_process(run_dir, 1)
    output = finish(process)
    assert process.returncode == 0, output
    assert curve(run_dir) == undisturbed
    assert read_incidents(run_dir) == []
    _nothing_left(hosts, run_dir)


def test_an_unknown_host(hosts: Hosts, settings: list[str], tmp_path: Path) -> None:
    status, output = run(tmp_path / "run", *settings, *_args(hosts, "a,nowhere"))
    assert status == 2
    assert "xtrain: error: node nowhere: there is no host of this name: " in output
    _nothing_left(hosts, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("ssh refused", "it refuses ssh"),
        ("other key", "ssh is not let in without a password"),
        ("no xtrain", "its Python has no xtrain"),
        ("cluster.python=/no/python", "the Python or the working folder is not there"),
        ("other version", "xtrain 0.0.1 there, "),
        ("other script", "the script {script} has another content than here"),
        ("no script", "the script {script} is not there"),
        ("no run folder", "the run folder {run} is not there: put it on a file system that all nodes see"),
        ("cluster.interface=eth7", "there is no network interface eth7 with an address: it has eth0, lo"),
        ("model.hidden_size=65536", "1 ranks need "),
    ],
)
def test_a_host_that_does_not_fit(
    hosts: Hosts, settings: list[str], tmp_path: Path, what: str, said: str
) -> None:
    run_dir, script, other = (
        tmp_path / "folder" / "run",
        tmp_path / "scripts" / "train.py",
        tmp_path / "other",
    )
    for folder in (run_dir.parent, script.parent):
        folder.mkdir()
    script.write_text("raise SystemExit('is not to be run')\n")
    other.write_text("__version__ = '0.0.1'\n")
    args = [*settings, *_args(hosts)]
    if "script" in what:
        args = [word for word in args if not word.startswith(("model.", "train.", "data."))] + [
            f"script={script}"
        ]
    own: dict[str, dict[Path, Path | None]] = {
        "other key": {hosts.folder / "authorized_keys": other},
        "other version": {ROOT / "xtrain" / "version.py": other},
        "other script": {script: other},
        "no script": {script.parent: None},
        "no run folder": {run_dir.parent: None},
    }
    if what == "ssh refused":
        hosts.kill("b")
    elif what == "no xtrain":
        script.write_text('#!/bin/sh\nexec env -u PYTHONPATH /usr/bin/python3 "$@"\n')
        script.chmod(0o755)
        args.append(f"cluster.python={script}")
    elif what in own:
        hosts.reboot("b", own[what])
    else:
        args.append(what)
    status, output = run(run_dir, *args)
    assert status == 2, output
    # What is wrong everywhere is told of the first.
    node = "a" if "=" in what or what == "no xtrain" else "b"
    sentence = said.format(script=script, run=run_dir)
    assert f"xtrain: error: node {node}: {sentence}" in output
    assert output.count("xtrain: ") == 1
    assert "Traceback" not in output
    _nothing_left(hosts, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "cut"])
def test_a_host_goes_and_comes_back(
    hosts: Hosts, settings: list[str], undisturbed: Curve, tmp_path: Path, how: str
) -> None:
    """The run goes on without it and, when it answers again, with it; the bits are those of an undisturbed run."""
    run_dir = tmp_path / "run"
    process = start(
        run_dir, *settings, *_args(hosts), "cluster.node_timeout=4", "cluster.rejoin_interval=1",
        "cluster.ssh.connect_timeout=3",
    )  # fmt: skip
    _under_way(run_dir)
    if how == "kill":
        hosts.kill("b")
    else:
        hosts.cut("b")
    wait_for(lambda: len(read_incidents(run_dir)) > 0)
    assert read_incidents(run_dir)[0]["node"] == "b"
    wait_for(
        lambda: len(processes_of(run_dir)) == 1, seconds=30
    )  # the one on a; a host that is cut off ends its own
    if how == "kill":
        hosts.reboot("b")
    else:
        hosts.mend("b")
    output = finish(process, 240)
    assert process.returncode == 0, output
    assert "going on with 1 of 2 ranks, on a" in output
    assert [one["kind"] for one in read_incidents(run_dir)] == ["node", "growth"]
    assert read_incidents(run_dir)[1]["cause"] == "b answers again"
    assert "2 incidents (incidents.jsonl); goodput " in output
    assert curve(run_dir) == undisturbed
    _nothing_left(hosts, run_dir)


@pytest.mark.slow
def test_a_stopped_rank_is_found_and_killed_ranks_are_named(
    hosts: Hosts, settings: list[str], undisturbed: Curve, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, *settings, *_args(hosts), "cluster.hang_timeout=8")
    _under_way(run_dir)
    os.kill(rank_process(run_dir, 1), signal.SIGSTOP)
    wait_for(lambda: len(read_incidents(run_dir)) > 0)
    log = (run_dir / "logs" / "rank0.log").read_text()
    assert "Current thread" in log
    assert "pretrain_glm.py" in log.partition("Current thread")[2]
    wait_for(lambda: "start 2 of this run" in (run_dir / "logs" / "rank0.log").read_text())
    wait_for(lambda: steps(run_dir) > 50, seconds=120)
    os.kill(rank_process(run_dir, 0), signal.SIGKILL)
    output = finish(process, 240)
    assert process.returncode == 0, output
    hang, killed = read_incidents(run_dir)
    assert (hang["kind"], hang["node"], hang["rank"]) == ("hang", "b", 1)
    assert "rank 1 on b is stopped (SIGSTOP or a debugger) and has not gone on for " in output
    assert (killed["kind"], killed["node"], killed["rank"]) == ("rank", "a", 0)
    assert "rank 0 on a was killed by SIGKILL" in output
    assert curve(run_dir) == undisturbed
    _nothing_left(hosts, run_dir)


@pytest.mark.slow
def test_signals_save_and_the_same_command_continues(
    hosts: Hosts, settings: list[str], undisturbed: Curve, tmp_path: Path
) -> None:
    """The end of an ssh session, kill, Ctrl-C."""
    run_dir = tmp_path / "run"
    args = [*settings, *_args(hosts), "resume=auto"]
    for number, step in ((signal.SIGHUP, 22), (signal.SIGTERM, 44), (signal.SIGINT, 66)):
        process = start(run_dir, *args)
        _under_way(run_dir, step)
        process.send_signal(number)
        output = finish(process)
        assert process.returncode == 130, output
        assert f"stopped; continue with: xtrain launch resume={run_dir}" in output
        _nothing_left(hosts, run_dir)
        saved = steps(run_dir)
        assert step <= saved < STEPS
        assert (run_dir / "checkpoint" / "latest").read_text() == f"global_step{saved}"
    status, output = run(run_dir, *args)
    assert status == 0, output
    assert curve(run_dir) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when_saved", "after_a_step", "said"),
    [
        ("pass", "time.sleep(600)", "ranks were killed before they could save a checkpoint"),
        (
            "time.sleep(600)",
            "time.sleep(0.1)",
            "ranks were killed after they had saved a checkpoint; a checkpoint is in ",
        ),
    ],
)
def test_a_second_ctrl_c_kills_now(
    hosts: Hosts, tmp_path: Path, when_saved: str, after_a_step: str, said: str
) -> None:
    run_dir, script = tmp_path / "run", tmp_path / "train.py"
    script.write_text(WAITING.replace("WHEN_SAVED", when_saved).replace("AFTER_A_STEP", after_a_step))
    process = start(run_dir, f"script={script}", "cluster.ranks_per_node=1", *_args(hosts))
    log = run_dir / "logs" / "rank1.log"
    wait_for(lambda: log.exists() and "step 0" in log.read_text())
    process.send_signal(signal.SIGINT)
    if after_a_step == "time.sleep(0.1)":
        wait_for(lambda: (run_dir / "logs" / "stopped").exists())
    time.sleep(1.5)  # what comes within a second is the same request
    second = time.monotonic()
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert time.monotonic() - second < 20
    assert process.returncode == 130
    assert "(Ctrl-C again kills them now)" in output
    assert said in output
    _nothing_left(hosts, run_dir)
