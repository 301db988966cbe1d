"""A rendezvous of torchrun's agents in which nothing is left to settle: the launcher has numbered the nodes."""

from __future__ import annotations

from torch.distributed import Store
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo


class Assigned(RendezvousHandler):
    """Who meets is settled.

    Args:
        store: of the agents.
        node_rank, nodes: this node's number, and how many there are.
        master: MASTER_ADDR and MASTER_PORT of the ranks.
        run_id: a name for torchrun's own variables.
    """

    def __init__(
        self, store: Store, node_rank: int, nodes: int, master: RendezvousStoreInfo, run_id: str
    ) -> None:
        self._info = RendezvousInfo(store, node_rank, nodes, master)
        self._run_id = run_id

    def get_backend(self) -> str:
        """A name for logs."""
        return "xtrain"

    @property
    def use_agent_store(self) -> bool:
        """False: the ranks do not meet at the agents' store by torchrun's way."""
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        """What the launcher has said."""
        return self._info

    def is_closed(self) -> bool:
        """Never: the launcher ends agents."""
        return False

    def set_closed(self) -> None:
        """The launcher ends agents; there is nothing to tell the others."""

    def num_nodes_waiting(self) -> int:
        """None: a node that comes is told to the launcher, which starts anew."""
        return 0

    def get_run_id(self) -> str:
        """The name."""
        return self._run_id

    def shutdown(self) -> bool:
        """There is nothing to close."""
        return True
