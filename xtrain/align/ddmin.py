"""Delta debugging: the smallest set of changes that makes a test fail. Knows nothing of runs and configurations.

Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", IEEE Transactions on Software Engineering
28(2), 2002: the algorithm ddmin. A test that cannot be carried out (their "?") counts as one that does not fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import TypeVar

T = TypeVar("T")
Fails = Callable[[tuple[T, ...]], bool]


def _pieces(changes: tuple[T, ...], count: int) -> list[tuple[T, ...]]:
    """`count` pieces in order whose sizes differ by one at most; none is empty."""
    ends = [len(changes) * i // count for i in range(count + 1)]
    return [changes[start:end] for start, end in pairwise(ends)]


def _reduced(changes: tuple[T, ...], count: int, fails: Fails[T]) -> tuple[tuple[T, ...], int] | None:
    """A smaller set that fails, with the granularity to go on with; None: no piece and no complement does."""
    pieces = _pieces(changes, count)
    for piece in pieces:
        if fails(piece):
            return piece, 2
    if count == 2:
        return None  # each piece is the other's complement
    for i in range(count):
        rest = tuple(chain.from_iterable(pieces[:i] + pieces[i + 1 :]))
        if fails(rest):
            return rest, count - 1
    return None


def ddmin(changes: Sequence[T], fails: Fails[T]) -> tuple[T, ...]:
    """A subset that fails, and of which no single change can be left out.

    Args:
        changes: all of them together fail, none of them does not; neither is tested here.
        fails: asked again for the same subset now and then, so it should remember. Subsets keep the order.
    """
    left, count = tuple(changes), 2
    while len(left) > 1:
        smaller = _reduced(left, min(count, len(left)), fails)
        if smaller is not None:
            left, count = smaller
        elif count < len(left):
            count *= 2
        else:
            break
    return left


def minimal_in_groups(groups: Sequence[tuple[T, ...]], fails: Fails[T]) -> tuple[T, ...]:
    """`ddmin` over groups of changes that are best made together, then over the changes of those that are left.

    The result is minimal as that of `ddmin` is: of single changes.
    """

    def together(chosen: tuple[tuple[T, ...], ...]) -> bool:
        return fails(tuple(chain.from_iterable(chosen)))

    found = ddmin(groups, together)
    changes = tuple(chain.from_iterable(found))
    return changes if len(changes) == len(found) else ddmin(changes, fails)
