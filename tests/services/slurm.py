"""Slurm on one machine: munged, slurmctld and a slurmd for each of two nodes, in a folder and on ports of their own.

The nodes share the machine, its name and its address; SLURMD_NODENAME tells them apart.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

_PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_CONF = """\
ClusterName=xtrain
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again waits until its credential has expired; two minutes are usual, this is the least.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=30
SlurmdTimeout=30
InactiveLimit=0
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 OverSubscribe=FORCE:8 State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None when there can."""
    if os.geteuid() != 0:
        return "needs root"
    for program in _PROGRAMS:
        if _program(program) is None:
            return f"needs {program} (Debian: slurm-wlm, munge)"
    return None


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    """All held at once, so that they differ."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Slurm:
    """Two nodes, n1 and n2, from `start` to `stop`; `environment` is for the processes that use them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """Without what a surrounding Slurm has set."""
        own = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        }
        return {**own, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Start the services, and wait until both nodes take jobs."""
        (self.folder / "state").mkdir(parents=True)
        for name in ("n1", "n2"):
            (self.folder / f"spool-{name}").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        text = _CONF.format(folder=self.folder, ports=_free_ports(3), cpus=os.cpu_count())
        (self.folder / "slurm.conf").write_text(text)
        munge = [
            f"--{name}={self.folder}/munge.{name.removesuffix('-file')}" for name in ("socket", "pid-file")
        ]
        munge += [
            f"--key-file={key}",
            f"--log-file={self.folder}/munge.log",
            f"--seed-file={self.folder}/seed",
        ]
        self._serve("munged", "--foreground", "--force", *munge)
        _wait(lambda: (self.folder / "munge.socket").exists(), self._logs)
        self._serve("slurmctld", "-D", "-c")
        for name in ("n1", "n2"):
            self._serve("slurmd", "-D", "-N", name)
        _wait(lambda: self.states() == ["idle", "idle"], self._logs)

    def _serve(self, program: str, *args: str) -> None:
        path = _program(program)
        assert path is not None
        with (self.folder / "services.log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", path, *args],  # with this process when it is killed
                    env=self.environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _logs(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))

    def run(self, *command: str) -> str:
        """What one of Slurm's commands prints.

        Raises:
            RuntimeError: it fails.
        """
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def states(self) -> list[str]:
        """Of n1 and n2: idle, mixed, allocated, down."""
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%N %T"],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return [line.split()[1] for line in sorted(done.stdout.splitlines())]

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ... as scontrol says."""
        said = self.run("scontrol", "show", "job", job)
        return next(word.partition("=")[2] for word in said.split() if word.startswith("JobState="))

    def exit_status(self, job: str) -> int:
        """Of the batch script of a job that has ended."""
        said = self.run("scontrol", "show", "job", job)
        words = next(word.partition("=")[2] for word in said.split() if word.startswith("ExitCode="))
        return int(words.partition(":")[0])

    def wait(self, job: str, *states: str, seconds: float = 120) -> str:
        """Until the job is in one of these states, ended if none is named; the state."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        _wait(lambda: self.state(job) in wanted, self._logs, seconds)
        return self.state(job)

    def clear(self) -> None:
        """Cancel all jobs, and have both nodes ready again."""
        self.run("scancel", "--user=root", "--full", "--signal=KILL")
        self.run("scancel", "--user=root")
        for name, state in zip(("n1", "n2"), self.states(), strict=True):
            if state.startswith(("down", "drain")):
                self.run("scontrol", "update", f"nodename={name}", "state=resume")
        _wait(lambda: self.states() == ["idle", "idle"], self._logs)

    def stop(self) -> None:
        """End the services, and what their jobs have left."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self._processes):
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()


def _wait(condition: Callable[[], bool], logs: Callable[[], str], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError(f"waited {seconds:g} s in vain:\n{logs()}")
        time.sleep(0.1)
