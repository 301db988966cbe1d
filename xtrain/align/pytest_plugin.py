"""The fixture `xtrain_align` and the option `--update-reference`: alignment as a test.

    def test_curve(xtrain_align, tmp_path):
        train(record=tmp_path / "run.jsonl")
        xtrain_align(tmp_path / "run.jsonl", "references/small.jsonl", policy="relative:1e-3")

Installed with xtrain as an entry point of pytest, so nothing heavy is imported before a test asks for the fixture.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xtrain.align.alignment import Alignment


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("xtrain").addoption(
        "--update-reference",
        action="store_true",
        help="xtrain_align: store the candidates as the new references instead of comparing",
    )


@pytest.fixture
def xtrain_align(request: pytest.FixtureRequest) -> Callable[..., Alignment | None]:
    """`xtrain_align(candidate, reference, policy="relative:0.02", envelope=None, loss=None)`.

    Fails the test with the whole report when the curves part, or can't be compared. A relative reference path
    counts from the test's own file. With --update-reference the candidate is copied to it instead, and None
    returned; else the Alignment is.
    """

    def check(
        candidate: str | os.PathLike[str],
        reference: str | os.PathLike[str],
        policy: str = "relative:0.02",
        envelope: str | os.PathLike[str] | None = None,
        loss: str | None = None,
    ) -> Alignment | None:
        __tracebackhide__ = True
        from xtrain.align.alignment import align
        from xtrain.align.record import record_file
        from xtrain.align.sources import read_curve
        from xtrain.align.text import markdown
        from xtrain.errors import RecordError

        folder = request.path.parent
        stored, given = folder / reference, Path(candidate)
        try:
            if request.config.getoption("--update-reference"):
                read_curve(given, loss)  # what cannot be read must not become a reference
                if not record_file(given).is_file():
                    pytest.fail(
                        f"{given} is a folder: give the file in it that is to be stored", pytrace=False
                    )
                stored.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(record_file(given), stored)
                return None
            if not stored.exists():
                pytest.fail(
                    f"there is no reference {stored}: run pytest with --update-reference", pytrace=False
                )
            band = None if envelope is None else folder / envelope
            alignment = align(stored, given, policy, band, loss)
        except RecordError as error:
            pytest.fail(str(error), pytrace=False)
        if not alignment.aligned:
            pytest.fail(markdown(alignment), pytrace=False)
        return alignment

    return check
