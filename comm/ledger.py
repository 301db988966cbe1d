"""Counts what goes over the wire: calls, message bytes and bytes sent, by operation and group.

"Sent" is what one rank has to send at least, the bandwidth-optimal volume of the operation (what a
ring sends), so that figures can be compared with formulas whatever algorithm the library uses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from xtrain.base.errors import ConfigError
from xtrain.base.log import log_dist
from xtrain.comm.timing import comms_logger

_FACTOR = {
    # operation: bytes sent per rank / message bytes, as a function of the group's size n
    "all_reduce": lambda n: Fraction(2 * (n - 1), n),
    "reduce_scatter": lambda n: Fraction(n - 1, n),  # message: the whole input
    "all_gather": lambda n: Fraction(n - 1, n),  # message: the whole output
    "roll_call": lambda n: Fraction(n - 1, n),  # one number of each rank: who does what
    "all_to_all": lambda n: Fraction(n - 1, n),
    "broadcast": lambda n: Fraction(n - 1, n),  # averaged over the ranks of the tree
    "reduce": lambda n: Fraction(n - 1, n),  # likewise
    "gather": lambda n: Fraction(n - 1, n),  # callers know who sends
    "scatter": lambda n: Fraction(n - 1, n),  # likewise
    "send": lambda n: Fraction(1),
    "recv": lambda n: Fraction(0),
    "barrier": lambda n: Fraction(0),
}


@dataclass
class Entry:
    """Totals of one (operation, group): calls, bytes of the messages, bytes sent by this rank."""

    calls: int = 0
    message_bytes: int = 0
    sent_bytes: Fraction = Fraction(0)


class Ledger:
    """Exact totals since the last `reset`.

    Attributes:
        listener: called with (operation, bytes that this rank sends) before each operation starts.
    """

    def __init__(self) -> None:
        self.listener: Callable[[str, float], None] | None = None
        self.entries: dict[tuple[str, str], Entry] = defaultdict(Entry)

    def record(
        self,
        operation: str,
        group_name: str,
        group_size: int,
        message_bytes: int,
        sent_bytes: int | None = None,
    ) -> None:
        """Count one call. `message_bytes`: size of the full message, see the table above; `sent_bytes`: what this
        rank sends, where it does not follow from the table."""
        entry = self.entries[operation, group_name]
        entry.calls += 1
        entry.message_bytes += message_bytes
        sent = message_bytes * _FACTOR[operation](group_size) if sent_bytes is None else Fraction(sent_bytes)
        entry.sent_bytes += sent
        if self.listener is not None:
            self.listener(operation, float(sent))

    def sent_bytes(self, *operations: str) -> Fraction:
        """Bytes sent by this rank in the given operations (all of them when none is named)."""
        return sum(
            (
                entry.sent_bytes
                for (name, _), entry in self.entries.items()
                if not operations or name in operations
            ),
            Fraction(0),
        )

    def reset(self) -> None:
        """Forget all totals."""
        self.entries.clear()

    def summary(self) -> str:
        """A table, one line per operation and group."""
        lines = [f"{'operation':<16}{'group':<12}{'calls':>8}{'message MiB':>14}{'sent MiB':>12}"]
        for (operation, group), entry in sorted(self.entries.items()):
            lines.append(
                f"{operation:<16}{group:<12}{entry.calls:>8}"
                f"{entry.message_bytes / 2**20:>14.3f}{float(entry.sent_bytes) / 2**20:>12.3f}"
            )
        return "\n".join(lines)


ledger = Ledger()
"""The ledger of this process."""


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> dict[str, Any] | None:
    """Log the ledger on rank 0, and latencies and bandwidths if the communication log is or was on.

    Args:
        show_straggler: and how long rank 0 waited for slower ranks; all ranks must call.
        return_dict: return the tables of latencies as `deepspeed.comm.log_summary` does, on every rank.

    Raises:
        ConfigError: stragglers are asked for, and nothing was timed.
    """
    if show_straggler and not (comms_logger.enabled or comms_logger.has_data()):
        raise ConfigError(
            "log_summary(show_straggler=True) needs timings: set comms_logger.enabled in the config, or call "
            "comm.configure(enabled=True) before"
        )
    log_dist("communication since start (rank 0)\n" + ledger.summary(), ranks=[0])
    return comms_logger.log_all(show_straggler=show_straggler, return_dict=return_dict)


def reset_log() -> None:
    """Forget all timings; the ledger's totals are forgotten by `ledger.reset()`."""
    comms_logger.reset_data()


def has_comm_data() -> bool:
    """Whether any operation was timed."""
    return comms_logger.has_data()


def get_comm_operation_count() -> int:
    """How many operations were timed."""
    return comms_logger.get_total_operations()


def get_logged_comm_ops() -> list[str]:
    """The names under which timed operations were summed up."""
    return comms_logger.get_operation_names()
