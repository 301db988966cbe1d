"""Hosts on one machine: network namespaces with addresses of their own on a bridge, an sshd in each.

They share processes' numbers and users with the machine; what each has for itself is its network, and those files that
are laid over the machine's when it boots.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

_NET = "10.77.{net}.{host}"


def missing() -> str | None:
    """Why there can be no hosts here; None when there can."""
    if os.geteuid() != 0:
        return "needs root"
    for program in ("ip", "ssh", "ssh-keygen", "/usr/sbin/sshd"):
        if shutil.which(program) is None:
            return f"needs {program} (Debian: iproute2, openssh-client, openssh-server)"
    probe = subprocess.run(
        ["ip", "link", "add", "xtprobe", "type", "bridge"], capture_output=True, text=True, check=False
    )
    if probe.returncode:
        return f"cannot make network devices here: {probe.stderr.strip()}"
    _run("ip", "link", "del", "xtprobe")
    return None


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


class Hosts:
    """Some hosts, from `start` to `stop`.

    Args:
        folder: for keys, configurations and logs.
        names: of the hosts.
        net: third number of their addresses, and part of the devices' names: one a set of hosts.
        own: a folder that each host has for itself, empty at first; None: they share all files.
    """

    def __init__(self, folder: Path, names: list[str], net: int = 0, own: Path | None = None) -> None:
        self.folder, self.names, self.net, self.own = folder, names, net, own
        self.bridge = f"xtbr{net}"
        self._sshd: dict[str, subprocess.Popen[bytes]] = {}

    def address(self, name: str) -> str:
        """Of a host."""
        return _NET.format(net=self.net, host=self.names.index(name) + 1)

    def _space(self, name: str) -> str:
        return f"xt{self.net}-{name}"

    def _link(self, name: str) -> str:
        return f"xtv{self.net}-{self.names.index(name)}"

    @property
    def ssh_config(self) -> Path:
        """For `ssh -F`."""
        return self.folder / "ssh_config"

    def start(self) -> None:
        """Make networks and keys, start the servers."""
        self.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("host_key", "user_key"):
            if not (self.folder / key).exists():
                _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized_keys")
        public = (self.folder / "host_key.pub").read_text().split()[:2]
        known = [f"{self.address(name)} {' '.join(public)}" for name in self.names]
        (self.folder / "known_hosts").write_text("\n".join(known) + "\n")
        self.ssh_config.write_text(
            "".join(f"Host {name}\n  HostName {self.address(name)}\n" for name in self.names)
            + f"Host *\n  User root\n  IdentityFile {self.folder}/user_key\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.folder}/known_hosts\n  StrictHostKeyChecking yes\n  LogLevel ERROR\n"
        )
        _run("ip", "link", "add", self.bridge, "type", "bridge")
        _run("ip", "addr", "add", _NET.format(net=self.net, host=254) + "/24", "dev", self.bridge)
        _run("ip", "link", "set", self.bridge, "up")
        for name in self.names:
            self._make(name)
            self.boot(name)
        for name in self.names:
            self._wait(name)

    def _make(self, name: str) -> None:
        space, link = self._space(name), self._link(name)
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run("ip", "link", "set", link, "master", self.bridge)
        _run("ip", "link", "set", link, "up")
        _run("ip", "-n", space, "addr", "add", self.address(name) + "/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _run("ip", "-n", space, "link", "set", device, "up")

    def boot(self, name: str, own: Mapping[Path, Path | None] | None = None) -> None:
        """Start the host's sshd.

        Args:
            own: files or folders of the machine in whose place this host has others; None: an empty folder.
        """
        config = self.folder / f"sshd_{name}"
        config.write_text(
            f"Port 22\nListenAddress {self.address(name)}\nHostKey {self.folder}/host_key\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nStrictModes no\nPermitRootLogin yes\nUsePAM no\n"
            f"PidFile none\nMaxStartups 100\n"
        )
        laid = {**({self.own: None} if self.own is not None else {}), **(own or {})}
        mounts = [
            ["mount", *(["-t", "tmpfs", "tmpfs"] if source is None else ["--bind", str(source)]), str(place)]
            for place, source in laid.items()
        ]
        words = [*mounts, ["exec", "/usr/sbin/sshd", "-D", "-e", "-f", str(config)]]
        server = ["unshare", "-m", "sh", "-c", " && ".join(map(shlex.join, words))]
        with (self.folder / f"sshd_{name}.log").open("ab") as log:
            self._sshd[name] = subprocess.Popen(
                # With this process when it is killed.
                ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self._space(name), *server],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def reboot(self, name: str, own: Mapping[Path, Path | None] | None = None) -> None:
        """End everything on a host, and start it again."""
        self.kill(name)
        self.boot(name, own)
        self._wait(name)

    def _wait(self, name: str) -> None:
        for _ in range(100):
            probe = subprocess.run(
                ["ssh-keyscan", "-T", "1", "-t", "ed25519", self.address(name)],
                capture_output=True,
                text=True,
                check=False,
            )
            if probe.stdout:
                return
            time.sleep(0.1)
        raise RuntimeError(
            f"sshd of {name} does not answer: {(self.folder / f'sshd_{name}.log').read_text()}"
        )

    def ssh(self, name: str, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a host."""
        return subprocess.run(
            ["ssh", "-F", str(self.ssh_config), "-o", "BatchMode=yes", name, command],
            capture_output=True,
            text=True,
            check=False,
        )

    def processes(self, name: str) -> list[int]:
        """All processes of a host."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self._space(name)).split()]

    def kill(self, name: str) -> None:
        """End everything on a host at once, sshd included: its power is gone."""
        for _ in range(3):  # what is being forked meanwhile
            for pid in self.processes(name):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        if name in self._sshd:
            self._sshd.pop(name).wait()

    def cut(self, name: str) -> None:
        """Take the host's link down."""
        _run("ip", "link", "set", self._link(name), "down")

    def mend(self, name: str) -> None:
        """Put the host's link up."""
        _run("ip", "link", "set", self._link(name), "up")

    def stop(self) -> None:
        """End everything, and remove the networks."""
        existing = _run("ip", "netns", "list")
        for name in self.names:
            if f"{self._space(name)}\n" in existing or f"{self._space(name)} " in existing:
                self.kill(name)
                _run("ip", "netns", "del", self._space(name))
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True, check=False)
