"""One node's part of a `deepspeed` command on several: `python -m xtrain.launch.deepspeed.on_node [NODE_RANK]`.

Reads the invocation from its standard input, so that what it exports stands in no command line, and ends its ranks when
that closes: the command, or the connection to it, has gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import replace

from xtrain.base.errors import XtrainError
from xtrain.base.log import configure
from xtrain.launch import devices, survey
from xtrain.launch.deepspeed.command import check_machine
from xtrain.launch.deepspeed.invocation import Invocation
from xtrain.launch.deepspeed.local import run_local


def _end_with_input() -> None:
    """A thread."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _choose_interface(invocation: Invocation) -> None:
    """gloo takes the address of the host's own name, which is often loopback: it gets the one that others reach."""
    peer = next((node.name for node in invocation.nodes if node.name != invocation.master_addr), None)
    address = survey.own_address(invocation.master_addr or "localhost", peer)
    interface = next((name for name, own in survey.interfaces().items() if own == address), None)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def main(argv: list[str]) -> int:
    """Run the node's ranks; the exit status. Without an argument, Slurm says which node this is."""
    line = sys.stdin.readline()
    if not line:
        return 1
    node_rank = int(argv[0]) if argv else int(os.environ["SLURM_PROCID"])
    invocation = Invocation.decode(line.strip())
    configure(invocation.log_level)
    os.environ.update(invocation.exports)
    _choose_interface(invocation)
    variables = devices.find().variables
    invocation = replace(invocation, here=True, node_rank=node_rank, device_variables=variables)
    try:
        check_machine(invocation)
        if not os.path.isdir(invocation.cwd):
            raise XtrainError(
                f"the folder {invocation.cwd} is not there: put it on a file system that all hosts see"
            )
        threading.Thread(target=_end_with_input, daemon=True).start()
        return run_local(invocation)
    except XtrainError as error:
        print(f"xtrain: error: {invocation.nodes[node_rank].name}: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # the thread that waits for the end of the input need not be waited for
