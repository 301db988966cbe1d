"""Slurm's host lists against what `scontrol show hostnames` is documented to say, and against their own making."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtrain.base.errors import ConfigError
from xtrain.comm.hostlist import expand


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("tux1", "tux1"),
        ("tux1,tux2,tux5", "tux1 tux2 tux5"),
        ("tux[1-3]", "tux1 tux2 tux3"),
        ("gnode[10,20,25,37]", "gnode10 gnode20 gnode25 gnode37"),
        ("nid[001096-001098]", "nid001096 nid001097 nid001098"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("n[098-101],login", "n098 n099 n100 n101 login"),
        ("n[1-2]-ib,gpu-a-3", "n1-ib n2-ib gpu-a-3"),
        ("r[1-2]n[01,03]", "r1n01 r1n03 r2n01 r2n03"),
        ("r[0-1]c[0-1]s[7]", "r0c0s7 r0c1s7 r1c0s7 r1c1s7"),
        ("[1-2].example.org", "1.example.org 2.example.org"),
        ("n[1,x[3-4]y,7]", "n1 nx3y nx4y n7"),
        (" tux1 ", "tux1"),
    ],
)
def test_lists_are_written_out(text: str, hosts: str) -> None:
    assert list(expand(text)) == hosts.split()


def test_the_first_host_of_many_comes_at_once() -> None:
    assert next(expand("n[0000000001-9999999999]r[1-99999999]")) == "n0000000001r1"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a name is missing"),
        ("a,,b", "a name is missing"),
        ("a,", "a name is missing"),
        ("a[1-3", "a bracket is not closed"),
        ("a[]", "a name is missing"),
        ("a1]", "out of place"),
        ("a[3-1]", "runs backwards"),
        ("a[1-b]", "neither a number"),
        ("a[x]", "neither a number"),
        ("a[1-2-3]", "neither a number"),
        ("a b", "a blank"),
        ("a[²]", "neither a number"),
    ],
)
def test_what_is_no_list_is_said_with_its_place(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"cannot be read: at character \d+, .*{why}"):
        expand(text)


_WORD = st.text("abcxyz0189-.", min_size=1, max_size=4)


@st.composite
def _brackets(draw: st.DrawFn) -> tuple[str, list[str]]:
    """One pair of brackets: its text, and the alternatives that it stands for."""
    texts, meant = [], []
    for _ in range(draw(st.integers(1, 3))):
        low, count = draw(st.integers(0, 10**6)), draw(st.integers(1, 4))
        width = draw(st.integers(0, 8))
        numbers = [str(number).zfill(width) for number in range(low, low + count)]
        # A range is padded as its first number is, so the last one may be longer but not shorter.
        texts.append(numbers[0] if count == 1 else f"{numbers[0]}-{numbers[-1]}")
        meant += numbers
    return f"[{','.join(texts)}]", meant


@st.composite
def _name(draw: st.DrawFn) -> tuple[str, list[str]]:
    parts = draw(
        st.lists(st.one_of(_WORD.map(lambda word: (word, [word])), _brackets()), min_size=1, max_size=4)
    )
    text = "".join(text for text, _ in parts)
    return text, ["".join(row) for row in itertools.product(*(meant for _, meant in parts))]


@given(st.lists(_name(), min_size=1, max_size=3))
def test_any_list_means_what_it_was_made_from(names: list[tuple[str, list[str]]]) -> None:
    assert list(expand(",".join(text for text, _ in names))) == [host for _, meant in names for host in meant]


@given(st.text("ab01[],- ", max_size=12))
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        hosts = expand(text)
    except ConfigError:
        return
    assert not any(set("[], ") & set(host) for host in itertools.islice(hosts, 50))
