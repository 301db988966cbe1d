"""One `deepspeed` command, checked: what runs where. Made by deepspeed_command.py, carried out by whoever starts ranks.

It travels to the ranks as text, as an argument of rank.py.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from typing import Any

from xtrain.launch.nodes import Node


@dataclass(frozen=True)
class Invocation:
    """What a `deepspeed` command asks for.

    Attributes:
        nodes: the machines, in the order of their ranks; --include, --num_nodes and so on have been applied.
        here: ranks of this machine only are to be started, by this process: one node, or --no_ssh.
        node_rank: which of the nodes this machine is, when `here`.
        program: what a rank runs, without the script's arguments: python -u SCRIPT, say.
        arguments: the script's own.
        local_rank_argument: --local_rank=N stands before them.
        cwd: the folder that ranks start in.
        launcher: pdsh, openmpi, mpich, impi, slurm or mvapich: how other machines are reached.
        launcher_args: more arguments for it.
        hostfile: its name, whether or not there is one.
        exports: variables for ranks on other machines.
        device_variables: environment variables that limit which devices a process on this machine sees.
        master_addr: address of rank 0; None: the first that `hostname -I` gives on the first node.
        ssh_check: the first node has to answer to ssh before anything is started.
        venv_script: a shell script that other machines read before they start ranks.
        rank_logs: ranks write to files that begin so, and go on with N.log; None: to the terminal.
        pid_file: where the process number of the launcher is, while it runs.
        bind_cores: each rank gets cores of its own,
        core_list: of these; None: of all.
        elastic: fewest and most nodes; ranks that fail are started again.
        log_level: of the launcher's own messages.
    """

    nodes: tuple[Node, ...]
    here: bool
    node_rank: int
    program: tuple[str, ...]
    arguments: tuple[str, ...]
    local_rank_argument: bool
    cwd: str
    launcher: str
    launcher_args: tuple[str, ...]
    hostfile: str
    exports: dict[str, str]
    device_variables: tuple[str, ...]
    master_addr: str | None
    master_port: int
    ssh_port: int | None
    ssh_check: bool
    venv_script: str | None
    rank_logs: str | None
    pid_file: str | None
    bind_cores: bool
    core_list: str | None
    elastic: tuple[int, int] | None
    log_level: str

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return sum(node.slots for node in self.nodes)

    def command(self, local_rank: int) -> list[str]:
        """What the rank runs."""
        own = [f"--local_rank={local_rank}"] if self.local_rank_argument else []
        return [*self.program, *own, *self.arguments]

    def environment(self, node_rank: int, local_rank: int) -> dict[str, str]:
        """The variables of a rank, as DeepSpeed sets them; `master_addr` has to be known by now."""
        assert self.master_addr is not None
        node = self.nodes[node_rank]
        variables = {
            "RANK": sum(other.slots for other in self.nodes[:node_rank]) + local_rank,
            "LOCAL_RANK": local_rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_SIZE": node.slots,
            "LOCAL_WORLD_SIZE": node.slots,
            "CROSS_RANK": node_rank,
            "CROSS_SIZE": len(self.nodes),
            "GROUP_RANK": node_rank,
            "GROUP_WORLD_SIZE": len(self.nodes),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": self.master_port,
        }
        if node.devices is not None:
            variables |= dict.fromkeys(self.device_variables, ",".join(map(str, node.devices)))
        return {key: str(value) for key, value in variables.items()}

    def encode(self) -> str:
        """As text of letters, digits, - and _ only, which no shell and no launcher changes."""
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode()

    @staticmethod
    def decode(text: str) -> Invocation:
        """What `encode` was given."""
        values: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text))
        nodes = [
            Node(node["name"], node["slots"], None if node["devices"] is None else tuple(node["devices"]))
            for node in values.pop("nodes")
        ]
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return Invocation(nodes=tuple(nodes), **values)
