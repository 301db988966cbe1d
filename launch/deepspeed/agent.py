"""torchrun's agent for the ranks of one `deepspeed` command: `python -m xtrain.launch.deepspeed.agent INVOCATION`.

It opens no port: this machine's ranks are all that it knows, and they meet at MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

from xtrain.base.log import configure, logger
from xtrain.base.run_folder import LAUNCHER_VARIABLE
from xtrain.launch.deepspeed.invocation import Invocation
from xtrain.launch.processes import die_with_parent, python_module, signal_name

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import RunResult

RESTARTS = 100
"""How often DeepSpeed's elastic agent starts ranks again."""
SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"


def _run(invocation: Invocation) -> RunResult:
    from torch.distributed import HashStore
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousStoreInfo

    from xtrain.launch.rendezvous import Assigned

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # main() says in one line what it says in twenty
            logging.getLogger(name).setLevel(logging.CRITICAL)
    assert invocation.master_addr is not None
    # A meeting of one agent, in its own memory.
    master = RendezvousStoreInfo(invocation.master_addr, invocation.master_port)
    program, *arguments = python_module("xtrain.launch.deepspeed.rank", invocation.encode())
    spec = WorkerSpec(
        role="rank",
        local_world_size=invocation.nodes[invocation.node_rank].slots,
        entrypoint=program,
        args=tuple(arguments),
        rdzv_handler=Assigned(HashStore(), 0, 1, master, "deepspeed"),
        max_restarts=RESTARTS if invocation.elastic else 0,
        monitor_interval=0.1,
    )
    return LocalElasticAgent(spec, DefaultLogsSpecs()).run()


def main(argv: list[str]) -> int:
    """Run the ranks to their end; 0, or the status of the first one that failed."""
    # Before torch is imported, which takes seconds in which the launcher may die.
    die_with_parent(signal.SIGTERM, int(os.environ.pop(LAUNCHER_VARIABLE)))
    # The terminal's Ctrl-C comes to the launcher as well, which passes it on. A handler, and not SIG_IGN, which the
    # ranks would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    os.environ[SIGNALS] = "SIGTERM"
    invocation = Invocation.decode(argv[0])
    configure(invocation.log_level)

    from torch.distributed.elastic.multiprocessing import SignalException

    try:
        result = _run(invocation)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    if not result.is_failed():
        return 0
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    ended = (
        f"was killed by {signal_name(-first.exitcode)}"
        if first.exitcode < 0
        else f"ended with status {first.exitcode}"
    )
    others = "; the others were ended" if invocation.nodes[invocation.node_rank].slots > 1 else ""
    logger.error("local rank %d %s%s", first.local_rank, ended, others)
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
