"""torchrun's agent for one node: `python -m xtrain.launch.agent RUN_DIR RANKS -m xtrain.launch.rank ...`.

Starts the ranks, ends all of them when one fails, and leaves the exit codes for the launcher.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from xtrain.base.files import write_text
from xtrain.base.run_folder import EXIT_CODES, LAUNCHER_VARIABLE, LOGS
from xtrain.launch.processes import die_with_parent


def main(argv: list[str]) -> int:
    """Run the ranks to their end; 0 when all succeeded, 1 otherwise."""
    # Before torch is imported, which takes seconds in which the launcher may die.
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    die_with_parent(signal.SIGTERM, int(launcher) if launcher else None)  # the agent then ends its ranks

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    run_dir, ranks, command = Path(argv[0]), int(argv[1]), argv[2:]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=run_dir.name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-u", *command)
    except ChildFailedError as error:
        codes = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
        write_text(run_dir / LOGS / EXIT_CODES, json.dumps(codes))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
