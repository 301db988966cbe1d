"""The commands that start an agent on a node: on this machine, by ssh, by srun."""

from __future__ import annotations

import os
import re
import shlex
import sys

from xtrain.launch.nodes import Node
from xtrain.launch.processes import safe_path_flag
from xtrain.launch.schema import ClusterSection

_UNKNOWN = re.compile(
    r"Could not resolve hostname|Name or service not known|unknown host|Invalid node name", re.IGNORECASE
)
_ANSWERS: tuple[tuple[re.Pattern[str], str], ...] = (
    (_UNKNOWN, "there is no host of this name: correct cluster.hosts or the hostfile"),
    (
        re.compile(r"Connection refused"),
        "it refuses ssh: start sshd there, or give its port in ~/.ssh/config or cluster.ssh.args",
    ),
    (
        re.compile(r"Permission denied"),
        "ssh is not let in without a password: put your public key into its authorized_keys",
    ),
    (
        re.compile(r"Host key verification failed|REMOTE HOST IDENTIFICATION"),
        "its host key is not known or has changed: connect once by hand, and accept the key",
    ),
    (re.compile(r"timed out|No route to host|Network is unreachable", re.IGNORECASE), "it cannot be reached"),
    (
        re.compile(r"No module named '?xtrain"),
        "its Python has no xtrain: install it there, or name the Python with cluster.python",
    ),
    (
        re.compile(r"No such file or directory|not found|cannot execute|can't cd"),
        "the Python or the working folder is not there: name the node's Python with cluster.python",
    ),
)


def agent_words(cluster: ClusterSection) -> list[str]:
    """The agent's own command."""
    return [cluster.python or sys.executable, *safe_path_flag(), "-m", "xtrain.launch.agent"]


def agent_command(cluster: ClusterSection, node: Node) -> list[str]:
    """What starts the agent of a node."""
    words = agent_words(cluster)
    if cluster.launcher == "slurm":
        return [*_srun(cluster, node), *words]
    if cluster.launcher == "local" or node.name == "localhost":
        return words
    # A checkout is found by PYTHONPATH; everything else goes through the connection, where nobody reads it in ps.
    path = [f"PYTHONPATH={os.environ['PYTHONPATH']}"] if os.environ.get("PYTHONPATH") else []
    return ssh_command(
        cluster, node, f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*path, *words])}"
    )


def ssh_command(cluster: ClusterSection, node: Node, remote: str) -> list[str]:
    """ssh with a command for the node's shell."""
    options = ["-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={cluster.ssh.connect_timeout}"]
    return [cluster.ssh.command, *options, *cluster.ssh.args, node.name, remote]


def remote_command(cluster: ClusterSection, node: Node, remote: str) -> list[str]:
    """What runs a shell's command on a node."""
    if cluster.launcher == "slurm":
        return [*_srun(cluster, node), "sh", "-c", remote]
    return ssh_command(cluster, node, remote)


def _srun(cluster: ClusterSection, node: Node) -> list[str]:
    return [
        "srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--nodelist={node.name}", "--overlap",
        "--kill-on-bad-exit=0", "--unbuffered", "--quiet", *cluster.slurm.srun_args,
    ]  # fmt: skip


def explain_silence(node: Node, printed: list[str], code: int | None) -> str:
    """Why no agent has answered from a node, in one sentence."""
    text = "\n".join(printed)
    for pattern, why in _ANSWERS:
        if pattern.search(text):
            return f"node {node.name}: {why} ({printed[-1].strip()})"
    if printed:
        return f"node {node.name}: no agent could be started: {printed[-1].strip()}"
    how = "no answer came in time" if code is None else f"the connection ended with status {code}"
    return f"node {node.name}: no agent could be started: {how}"
