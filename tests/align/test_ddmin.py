"""Delta debugging on made-up failures: what is found fails, and nothing of it can be left out."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from xtrain.align.ddmin import ddmin, minimal_in_groups

Causes = list[frozenset[int]]


class Made:
    """Fails where all of one cause is there; some combinations cannot be tested, and then nothing is seen to fail."""

    def __init__(self, causes: Causes, unresolved: set[frozenset[int]]) -> None:
        self.causes, self.unresolved = causes, unresolved
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, changes: tuple[int, ...]) -> bool:
        self.asked.append(changes)
        return self.fails(frozenset(changes))

    def fails(self, changes: frozenset[int]) -> bool:
        return changes not in self.unresolved and any(cause <= changes for cause in self.causes)


@st.composite
def _problems(draw: st.DrawFn) -> tuple[int, Made]:
    size = draw(st.integers(1, 12))
    subset = st.frozensets(st.integers(0, size - 1), min_size=1, max_size=min(size, 4))
    causes = draw(st.lists(subset, min_size=1, max_size=3))
    unresolved = draw(st.sets(st.frozensets(st.integers(0, size - 1), min_size=1), max_size=20))
    return size, Made(causes, unresolved - {frozenset(range(size))})


def _check_minimal(found: tuple[int, ...], made: Made) -> None:
    assert made.fails(frozenset(found))
    for one_less in combinations(found, len(found) - 1):
        assert not made.fails(frozenset(one_less))


@given(_problems())
def test_what_is_found_fails_and_is_minimal(problem: tuple[int, Made]) -> None:
    size, made = problem
    found = ddmin(range(size), made)
    assert list(found) == sorted(set(found))
    _check_minimal(found, made)
    # The paper's bound.
    assert len(made.asked) <= size**2 + 3 * size


@given(_problems())
def test_a_cause_is_found_exactly_where_everything_can_be_tested(problem: tuple[int, Made]) -> None:
    size, made = problem
    made.unresolved = set()
    found = frozenset(ddmin(range(size), made))
    assert found in made.causes
    assert not any(cause < found for cause in made.causes)


@given(_problems(), st.data())
def test_groups(problem: tuple[int, Made], data: st.DataObject) -> None:
    size, made = problem
    cuts = sorted(data.draw(st.sets(st.integers(1, max(size - 1, 1)))) | {0, size})
    groups = [tuple(range(a, b)) for a, b in pairwise(cuts)]
    found = minimal_in_groups(groups, made)
    _check_minimal(found, made)


@given(st.integers(2, 200), st.data())
def test_a_single_cause_costs_two_tests_a_halving(size: int, data: st.DataObject) -> None:
    made = Made([frozenset({data.draw(st.integers(0, size - 1))})], set())
    assert frozenset(ddmin(range(size), made)) in made.causes
    assert len(made.asked) <= 2 * (size - 1).bit_length()


def test_the_example_of_the_paper() -> None:
    """Figure 4's case: of eight changes the first, seventh and eighth are needed together."""
    made = Made([frozenset({1, 7, 8})], set())
    assert ddmin(range(1, 9), made) == (1, 7, 8)
    assert made.asked[:2] == [(1, 2, 3, 4), (5, 6, 7, 8)]
