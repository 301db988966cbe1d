"""The beginning of a rank of a `deepspeed` command: `python -m xtrain.launch.deepspeed.rank INVOCATION [NODE]`.

Sets the variables, binds the cores, opens the log, and becomes the script.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from xtrain.base.errors import XtrainError
from xtrain.launch.deepspeed.binding import binding
from xtrain.launch.deepspeed.invocation import Invocation
from xtrain.launch.processes import die_with_parent


def _bind(invocation: Invocation, ranks: int, local_rank: int) -> list[str]:
    """Give this process its cores; returns what the command has to begin with."""
    own = binding(invocation.core_list, ranks, local_rank)
    os.environ["OMP_NUM_THREADS"] = str(len(own.cores))
    if not own.prefix:
        os.sched_setaffinity(0, own.cores)
    return own.prefix


def _redirect(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def main(argv: list[str]) -> int:
    """Become the rank LOCAL_RANK of the node; returns only if that fails."""
    die_with_parent()  # holds for the script, too
    invocation = Invocation.decode(argv[0])
    node_rank = int(argv[1]) if len(argv) > 1 else invocation.node_rank
    local_rank = int(os.environ["LOCAL_RANK"])
    os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)
    os.environ.update(invocation.environment(node_rank, local_rank))
    try:
        prefix = (
            _bind(invocation, invocation.nodes[node_rank].slots, local_rank) if invocation.bind_cores else []
        )
        command = [*prefix, *invocation.command(local_rank)]
        os.chdir(invocation.cwd)
        if invocation.rank_logs is not None:
            _redirect(Path(f"{invocation.rank_logs}{os.environ['RANK']}.log"))
        os.execvp(command[0], command)
    except XtrainError as error:
        print(f"xtrain: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"xtrain: error: rank {os.environ['RANK']} cannot be started: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
