"""The fixture `xtrain_align` and the option `--update-reference`: alignment as a test.

    def test_curve(xtrain_align, tmp_path):
        train(record=tmp_path / "run.jsonl")
        xtrain_align(tmp_path / "run.jsonl", "references/small.jsonl", policy="relative:1e-3")

Installed with xtrain as an entry point of pytest, so nothing heavy is imported before a test asks for the fixture.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xtrain.align.alignment import Alignment

_STORED = pytest.StashKey[dict[Path, str]]()
"""Which test has stored a reference in this session."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("xtrain").addoption(
        "--update-reference",
        action="store_true",
        help="xtrain_align: store the candidates as the new references instead of comparing",
    )


@pytest.fixture
def xtrain_align(request: pytest.FixtureRequest) -> Callable[..., Alignment | None]:
    """`xtrain_align(candidate, reference, policy="relative:0.02", envelope=None, loss=None, ...)`.

    Fails the test with the whole report when the curves part, or can't be compared as a whole. A relative reference
    path counts from the test's own file. With --update-reference the candidate is copied to it instead, and None
    returned; else the Alignment is.

    Args of the function:
        candidate, reference, policy, envelope, loss, shift: as those of `xtrain.align.alignment.align`.
        steps: up to which they must be there, whatever is left out beyond; None: nothing may be left out.
        update: whether --update-reference stores this candidate. False: it is compared all the same, for candidates
            that share a reference with the one that makes it.
    """

    def check(
        candidate: str | os.PathLike[str],
        reference: str | os.PathLike[str],
        policy: str = "relative:0.02",
        envelope: str | os.PathLike[str] | None = None,
        loss: str | None = None,
        *,
        shift: int = 0,
        steps: int | None = None,
        update: bool = True,
    ) -> Alignment | None:
        __tracebackhide__ = True
        from xtrain.align.alignment import align
        from xtrain.align.text import markdown
        from xtrain.base.errors import RecordError

        folder = request.path.parent
        stored, given = folder / reference, Path(candidate)
        band = None if envelope is None else folder / envelope
        updating = update and request.config.getoption("--update-reference")
        try:
            if updating:
                _store(request, given, stored, loss)
                _warn_if_outside(stored, policy, band, loss)
                return None
            if not stored.exists():
                pytest.fail(
                    f"there is no reference {stored}: run pytest with --update-reference", pytrace=False
                )
            alignment = align(stored, given, policy, band, loss, shift=shift)
        except RecordError as error:
            pytest.fail(str(error), pytrace=False)
        if not alignment.aligned:
            pytest.fail(markdown(alignment), pytrace=False)
        if steps is None and alignment.left_out:
            why = "; ".join(alignment.left_out)
            also = (
                "" if alignment.curve is None else f" (steps={alignment.curve.step[-1]} compares up to there)"
            )
            pytest.fail(f"{given} and {stored} cannot be compared as a whole: {why}{also}", pytrace=False)
        if steps is not None and alignment.curve is not None and alignment.curve.step[-1] < steps:
            pytest.fail(
                f"{given} and {stored} have steps up to {alignment.curve.step[-1]} in common, and not up to {steps}",
                pytrace=False,
            )
        return alignment

    return check


def _store(request: pytest.FixtureRequest, given: Path, stored: Path, loss: str | None) -> None:
    """Make a candidate the new reference."""
    __tracebackhide__ = True
    from xtrain.align.record import record_file
    from xtrain.align.sources import read_curve
    from xtrain.base.files import atomic_path

    by, key = request.config.stash.setdefault(_STORED, {}), stored.resolve()
    if key in by:
        pytest.fail(
            f"{stored} was stored by {by[key]} a moment ago: the last of several candidates would win; pass "
            "update=False to all but one",
            pytrace=False,
        )
    read_curve(given, loss)  # what cannot be read must not become a reference
    if not record_file(given).is_file():
        pytest.fail(f"{given} is a folder: give the file in it that is to be stored", pytrace=False)
    stored.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(stored) as temporary:
        shutil.copyfile(record_file(given), temporary)
    by[key] = request.node.nodeid


def _warn_if_outside(stored: Path, policy: str, envelope: Path | None, loss: str | None) -> None:
    """An envelope is not stored anew: it may be that of another training now."""
    from xtrain.align.alignment import ENVELOPE, align
    from xtrain.base.errors import RecordError

    if policy != "envelope":
        return
    again = f"measure {envelope or stored.parent / ENVELOPE} anew with `xtrain align envelope`"
    try:
        found = align(stored, stored, policy, envelope, loss)
    except RecordError as error:
        warnings.warn(f"the reference was stored, and has no envelope ({error}): {again}", stacklevel=3)
        return
    if not found.aligned:
        warnings.warn(
            f"the reference was stored, and its envelope is another's ({found.sentence()}): {again}",
            stacklevel=3,
        )
