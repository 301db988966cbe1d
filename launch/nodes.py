"""The machines of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A machine that ranks run on."""

    name: str  # as ssh or srun know it; "localhost": this machine, no ssh
    slots: int  # ranks that it gets
    devices: tuple[int, ...] | None = (
        None  # device numbers that its ranks may see, one a rank; None: all, in order
    )
