"""One disturbed run: started on hosts of their own, hurt at a random moment, and judged.

`python -m tests.chaos --runs 30` makes many and prints a table; test_chaos.py makes a few.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.services.hosts import Hosts
from xtrain.align.record import read_record

STEPS, INTERVAL = 300, 25
SMALL = ["model.num_layers=1", "model.hidden_size=32", "model.ffn_size=32", "model.vocab_size=300"]
SMALL += ["train.seq_length=32", "train.micro_batch_size=2", "train.global_batch_size=8"]
SMALL += [f"train.steps={STEPS}", f"train.save_interval={INTERVAL}", "+deepspeed.xtrain.aligned=true"]
PATIENT = [
    "cluster.node_timeout=6",
    "cluster.hang_timeout=8",
    "cluster.rejoin_interval=3",
    "cluster.ssh.connect_timeout=4",
]
KINDS = ("rank", "agent", "launcher", "node", "link", "sigstop", "save")
_AWAY = 12.0
"""Seconds after which a node or a link comes back."""
_LONGEST = 300.0


Curve = dict[int, float]


@dataclass
class Verdict:
    """What became of one run; `wrong` is empty when all is well."""

    kind: str
    at_step: int
    seconds: float
    lost: int
    incidents: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def launch(run_dir: Path, corpus: Path, settings: list[str]) -> subprocess.Popen[str]:
    """`xtrain launch` in the background; its output goes to a file beside the run folder."""
    command = [sys.executable, "-m", "xtrain.cli", "launch"]
    with run_dir.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [*command, f"run_dir={run_dir}", f"data.path={corpus}", *SMALL, *settings],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
            start_new_session=True,
        )


def on_hosts(hosts: Hosts) -> list[str]:
    """Settings for a rank on each host."""
    return [
        "cluster=hosts", f"cluster.hosts=[{','.join(hosts.names)}]", "cluster.ranks_per_node=1",
        f"cluster.ssh.args=[-F,{hosts.ssh_config}]", *PATIENT,
    ]  # fmt: skip


def steps_of(run_dir: Path) -> int:
    """The newest recorded step."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    lines = [
        line for line in path.read_text().splitlines()[-3:] if '"type": "step"' in line and line.endswith("}")
    ]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _processes(hosts: Hosts, name: str, word: str, run_dir: Path) -> list[int]:
    """Processes of a host and a run whose command line has a word in it."""
    found = []
    for pid in hosts.processes(name):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if word in command and (word == "xtrain.launch.agent" or str(run_dir) in environment):
            found.append(pid)
    return found


def _child(pid: int) -> int:
    """The launcher proper, which the process that was started keeps alive."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def hurt(
    kind: str, hosts: Hosts, run_dir: Path, launcher: int, chance: random.Random
) -> Callable[[], None] | None:
    """Do it; what brings things back later, if that is to be done."""
    name = chance.choice(hosts.names)
    ranks = _processes(hosts, name, "xtrain.launch.rank", run_dir)
    if kind in ("rank", "save"):
        os.kill(chance.choice(ranks), signal.SIGKILL)
    elif kind == "sigstop":
        os.kill(chance.choice(ranks), signal.SIGSTOP)
    elif kind == "agent":
        os.kill(_processes(hosts, name, "xtrain.launch.agent", run_dir)[-1], signal.SIGKILL)
    elif kind == "launcher":
        os.kill(_child(launcher), signal.SIGKILL)
    elif kind == "node":
        hosts.kill(name)
        return lambda: hosts.boot(name)
    else:
        hosts.cut(name)
        return lambda: hosts.mend(name)
    return None


def _wait_for_moment(kind: str, run_dir: Path, at: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + _LONGEST
    folder = run_dir / "checkpoint"
    while process.poll() is None and time.monotonic() < until:
        if steps_of(run_dir) >= at and (kind != "save" or list(folder.glob(".*.tmp"))):
            return
        time.sleep(0.001 if kind == "save" and steps_of(run_dir) >= at else 0.02)


def disturbed(kind: str, hosts: Hosts, run_dir: Path, corpus: Path, whole: Curve, seed: int) -> Verdict:
    """One run with one thing done to it, compared with the undisturbed losses."""
    chance = random.Random(seed)
    at, started = chance.randrange(2, STEPS - 60), time.monotonic()
    process = launch(run_dir, corpus, on_hosts(hosts))
    verdict = Verdict(kind, at, 0.0, 0)
    back = None
    try:
        _wait_for_moment(kind, run_dir, at, process)
        verdict.at_step = steps_of(run_dir)
        back = hurt(kind, hosts, run_dir, process.pid, chance)
        if back is not None:
            time.sleep(_AWAY)
            back()
            back = None
        status = process.wait(timeout=_LONGEST)
        if status:
            verdict.wrong.append(f"it ended with status {status}")
    except subprocess.TimeoutExpired:
        verdict.wrong.append(f"it did not end within {_LONGEST:g} s")
    finally:
        if back is not None:
            back()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    verdict.seconds = time.monotonic() - started
    _judge(verdict, run_dir, whole)
    return verdict


def _judge(verdict: Verdict, run_dir: Path, whole: Curve) -> None:
    path = run_dir / "incidents.jsonl"
    if path.exists():
        verdict.incidents = [json.loads(line)["what"] for line in path.read_text().splitlines()]
    if not verdict.incidents:
        verdict.wrong.append("no incident was written")
    losses = read_record(run_dir).losses()
    if losses != whole:
        first = next((step for step in whole if losses.get(step) != whole[step]), None)
        verdict.wrong.append(f"the curve differs from step {first} on ({len(losses)} of {len(whole)} steps)")
    verdict.lost = lost_steps(run_dir)
    if verdict.lost > INTERVAL:
        verdict.wrong.append(f"{verdict.lost} steps were lost, more than a save interval")


def lost_steps(run_dir: Path) -> int:
    """The most steps that a restart has taken back."""
    last, lost = 0, 0
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("type") == "header":
            lost = max(lost, last - entry.get("from_step", last))
        elif entry.get("type") == "step":
            last = entry["step"]
    return lost
