"""A run that differs from its reference in one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.detection.training import Training

Change = Callable[[Training], None]


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        title: what is different.
        change: makes it so.
        reference: title of the run that it is compared with.
        band: whose envelope judges it: that of the reference's perturbations of this size.
        ranks: it runs on.
        module: of defects, the module that is to blame ("" for none); a pattern with * if it may be any of several.
        needs: a package without which it can't run.
        report: of defects that were seen elsewhere: the public report, as repository#number.
        training: what is trained.
        environment: variables of processes of its own that it runs in; none: those of the pool.
    """

    title: str
    change: Change
    reference: str = "fp32"
    band: str = "one ulp"
    ranks: int = 2
    module: str = ""
    needs: str = ""
    report: str = ""
    training: type[Training] = Training
    environment: tuple[tuple[str, str], ...] = ()


def nothing(training: Training) -> None:
    """Leave everything as it is."""


def with_dropout(training: Training) -> None:
    """The reference with dropout, whose masks are those of aligned mode."""
    training.architecture["dropout"] = 0.1
    training.section(aligned=True)
