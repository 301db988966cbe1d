"""Which nodes of a run take part in its next start."""

from __future__ import annotations

import time
from collections.abc import Sequence

from xtrain.launch.agents import Agents
from xtrain.launch.checks import what_is_wrong
from xtrain.launch.job import Job
from xtrain.launch.nodes import Layout, Node, place


class Membership:
    """Failures of each node, and looking for those that are missing."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._failures: dict[str, int] = {}

    def _enough(self, nodes: Sequence[Node]) -> bool:
        return len(nodes) >= self._job.min_nodes and self._job.ranks_with(_slots(nodes)) > 0

    def usable(self) -> list[Node]:
        """Those that have not failed too often; all of them where the others would not do."""
        limit = self._job.cluster.node_failures
        good = [node for node in self._job.nodes if self._failures.get(node.name, 0) < limit]
        return good if self._enough(good) else list(self._job.nodes)

    def fail(self, name: str | None) -> bool:
        """Count a failure of a node; whether it is left out from now on."""
        if name is None or len(self._job.nodes) == 1:
            return False
        before = self.usable()
        self._failures[name] = self._failures.get(name, 0) + 1
        return len(self.usable()) < len(before)

    def layout(self, present: Sequence[Node]) -> Layout | None:
        """Ranks on the nodes that answer; None when they are too few."""
        if not self._enough(present):
            return None
        return place(present, self._job.ranks_with(_slots(present)))


class Lookout:
    """While a run has fewer ranks than it could have: asks missing nodes, now and then, whether they are back."""

    def __init__(self, job: Job, members: Membership) -> None:
        self._job, self._members = job, members
        self._asking: Agents | None = None
        self._until = self._next = 0.0

    def back(self, layout: Layout) -> list[str]:
        """Names of nodes that answer again, where there would be more ranks with them."""
        now, interval = time.monotonic(), self._job.cluster.rejoin_interval
        if not interval or layout.ranks >= self._job.ranks:
            return []
        if self._asking is None:
            missing = [node for node in self._members.usable() if node not in layout.nodes]
            if now > self._next and missing:
                self._asking = Agents(self._job, missing)
                self._until = now + 2.0 * self._job.cluster.ssh.connect_timeout
            return []
        if not self._asking.answered() and now < self._until:
            return []
        hellos = self._asking.hellos()
        self.close()
        self._next = now + interval
        good = set(hellos) - set(what_is_wrong(self._job, hellos))
        nodes = [node for node in self._job.nodes if node.name in good]
        more = self._job.ranks_with(_slots([*nodes, *layout.nodes])) > layout.ranks
        return [node.name for node in nodes] if more else []

    def close(self) -> None:
        """Ask nobody any more."""
        if self._asking is not None:
            self._asking.end(politely=False)
            self._asking = None


def _slots(nodes: Sequence[Node]) -> int:
    return sum(node.slots for node in nodes)
