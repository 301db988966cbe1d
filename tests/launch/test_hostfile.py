"""Hostfiles and their filters: what is read, and the sentence for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtrain.base.errors import ConfigError
from xtrain.launch import hostfile
from xtrain.launch.nodes import Node

TWO = {"worker-0": [0, 1, 2, 3], "worker-1": [0, 1, 2, 3]}


def test_hosts_keep_their_order_and_comments_say_nothing(tmp_path: Path) -> None:
    file = tmp_path / "hostfile"
    file.write_text("\n# the big one\n  b slots=4 max_slots=8\n10.0.0.1\tslots=2  # a comment\n#c slots=1\n")
    assert list((hostfile.read(file) or {}).items()) == [("b", 4), ("10.0.0.1", 2)]
    assert hostfile.read(tmp_path / "none") is None
    assert hostfile.read(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a slots=1\nb slots=2\na slots=1", "hf, line 3: host 'a' is there a second time"),
        ("a slots=1\nthis is bad slots=1", "hf, line 2: 'this is bad slots=1' is not of the form"),
        ("a:4", "hf, line 1: 'a:4' is not of the form"),
        ("a slots=x", "hf, line 1: "),
        ("a slots=0", "hf, line 1: 'a' has no slot"),
        ("# nothing\n\n", "hf names no host"),
    ],
)
def test_a_bad_line_is_named(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hostfile.parse_lines(text.splitlines(), "hf")
    assert str(caught.value).startswith(sentence)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "hf").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        hostfile.read(tmp_path / "hf")


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("", "", TWO),
        ("worker-0@worker-1:0,2", "", {"worker-0": [0, 1, 2, 3], "worker-1": [0, 2]}),
        ("worker-1@worker-0:3,3@worker-0:1", "", {"worker-0": [1, 3], "worker-1": [0, 1, 2, 3]}),
        ("", "worker-1:0", {"worker-0": [0, 1, 2, 3], "worker-1": [1, 2, 3]}),
        ("", "worker-0", {"worker-1": [0, 1, 2, 3]}),
        ("", "worker-0:0,1,2,3@worker-1", {}),
    ],
)
def test_filters(include: str, exclude: str, left: dict[str, list[int]]) -> None:
    found = hostfile.select(TWO, include, exclude)
    assert found == left
    assert list(found) == list(left)  # the order of the hostfile, whatever that of the filter


@pytest.mark.parametrize(
    ("include", "exclude", "sentence"),
    [
        ("worker-0", "worker-1", "--include and --exclude are both given"),
        ("worker_0", "", "unknown host 'worker_0': did you mean 'worker-0'?"),
        ("", "worker-1:4", "host 'worker-1' has no slot 4: it has 0, 1, 2, 3"),
        ("worker-0:a", "", "'worker-0:a' is not of the form"),
        ("worker-0:", "", "'worker-0:' is not of the form"),
        ("", "worker-1@worker-0:1@5", "unknown host '5'"),
    ],
)
def test_filters_that_are_wrong(include: str, exclude: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hostfile.select(TWO, include, exclude)
    assert str(caught.value).startswith(sentence)


def test_nodes_know_their_devices() -> None:
    assert hostfile.nodes({"a": [1, 3]}) == [Node("a", 2, (1, 3))]
    with pytest.raises(ConfigError, match="no slot is left"):
        hostfile.nodes({})
