"""How one start of a run's ranks ends, and what the launcher asks of whatever has started them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from xtrain.launch.failure import Failure


@dataclass
class Outcome:
    """How a start of the ranks has ended.

    Attributes:
        kind: "done", "stopped" (asked to, and saved), "failed", "hang" or "killed" (the user did not wait).
        failures: what ranks or agents have said.
        lost: nodes that have gone, and how.
        suspect: of a hang, the rank that the others wait for, and why it is that one.
        why: of a failure that no rank or node has told.
        by_rank: of a stop that a signal to a rank has brought about: the rank, and the signal's name.
        by_node: the same of agents: nodes, and the signal's name.
    """

    kind: str
    failures: list[Failure] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    suspect: tuple[int | None, str] = (None, "")
    why: str = ""
    by_rank: tuple[int, str] | None = None
    by_node: dict[str, str] = field(default_factory=dict)


class Start(Protocol):
    """Ranks that run: under agents, or under mpiexec or a queue's own starter.

    Attributes:
        troubles: what did not end the start, but has to be told when it has ended.
    """

    troubles: list[str]

    def poll(self) -> Outcome | None:
        """What has ended the start; None while it goes on."""

    def stop_ranks(self) -> None:
        """Have all ranks save at the same step and leave."""

    def end(self, politely: bool) -> None:
        """Leave nothing behind.

        Args:
            politely: the ranks have ended by themselves.
        """
