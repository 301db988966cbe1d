"""Five disturbed runs; `python -m tests.chaos` makes as many as one wants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.__main__ import reference
from tests.chaos.chaos import Curve, disturbed
from tests.parity.corpus import write_corpus
from tests.services.hosts import Hosts, missing

pytestmark = [pytest.mark.slow, pytest.mark.services]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hosts, Path, Path, Curve]]:
    if (why := missing()) is not None:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("chaos")
    corpus = write_corpus(folder, 200)
    hosts = Hosts(folder / "hosts", ["h0", "h1"], net=10)
    hosts.start()
    yield hosts, folder, corpus, reference(folder, corpus, 2)
    hosts.stop()


@pytest.mark.parametrize(
    ("kind", "seed"), [("agent", 1), ("launcher", 2), ("node", 3), ("sigstop", 4), ("save", 5)]
)
def test_a_disturbed_run_ends_with_the_undisturbed_curve(
    place: tuple[Hosts, Path, Path, Curve], kind: str, seed: int
) -> None:
    hosts, folder, corpus, whole = place
    verdict = disturbed(kind, hosts, folder / kind, corpus, whole, seed)
    assert not verdict.wrong, f"{verdict}\n{(folder / kind).with_suffix('.log').read_text()}"
