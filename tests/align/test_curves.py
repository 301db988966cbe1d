"""This repository's own use of `xtrain_align`: a small GLM against a stored reference and a measured envelope.

Training that rounds differently is within the envelope; coarser products and each kind of fault of backend "fake" are
not, and the report says where. `make align-reference` measures reference and envelope anew (small_glm.py); `pytest
tests/align/test_curves.py --update-reference` stores the record alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.align import small_glm
from tests.align.small_glm import ENVELOPE, REFERENCE, STEPS
from xtrain.align.alignment import Alignment
from xtrain.base.errors import TrainingError

STEP = 21
"""Of the faults: one of those at which the modules are measured."""
BLOCK = "layers.0.mlp.dense_in"


def fake(profile: str = "none", **more: Any) -> dict[str, Any]:
    return {"backend": "fake", "fake": {"profile": profile, **more}}


def faulty(**fault: Any) -> dict[str, Any]:
    return fake(faults=[{"step": STEP, "rank": 1, **fault}])


@pytest.fixture
def check(xtrain_align: Callable[..., Alignment], tmp_path: Path) -> Callable[..., Alignment]:
    """Compare what was recorded in `tmp_path` with the reference, by the envelope."""

    def compare(**more: Any) -> Alignment:
        return xtrain_align(tmp_path, REFERENCE, policy="envelope", envelope=ENVELOPE, **more)

    return compare


def test_the_reference(ranks: Any, check: Any, tmp_path: Path) -> None:
    """The same training again: with --update-reference it is what is stored."""
    ranks(2, small_glm.train, str(tmp_path), {})
    found = check()
    assert found is None or found.modules.first is None


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        pytest.param(2, fake("none"), id="fake"),
        pytest.param(2, fake("sw26010pro"), id="sw26010pro"),
        pytest.param(2, fake("dcu-nobf16"), id="dcu-nobf16"),
        pytest.param(2, {"stage": 0}, id="zero0"),
        pytest.param(2, {"stage": 2}, id="zero2"),
        pytest.param(2, {"stage": 3}, id="zero3"),
        pytest.param(1, {}, id="one-rank"),
        pytest.param(2, {"micro": 2}, id="accumulation"),
        pytest.param(2, {"aligned": True}, id="aligned"),
        pytest.param(2, faulty(kind="slow_rank", seconds=0.2), id="slow-rank"),
    ],
)
def test_rounding_is_within_the_envelope(
    ranks: Any, check: Any, tmp_path: Path, world: int, settings: dict[str, Any]
) -> None:
    ranks(world, small_glm.train, str(tmp_path), settings)
    found = check(update=False)
    assert found.curve.steps == STEPS
    assert found.modules.first is None, found.modules.sentence()
    assert found.modules.snapshots == 5


def test_another_perturbed_run_is_within_the_envelope(ranks: Any, check: Any, tmp_path: Path) -> None:
    ranks(2, small_glm.train, str(tmp_path), {}, "99")
    found = check(update=False)
    assert found.curve.bit_identical < STEPS


def test_aligned_runs_have_the_same_bits(ranks: Any, xtrain_align: Any, tmp_path: Path) -> None:
    runs = {"two": (2, {"stage": 3}), "one": (1, {"stage": 0})}
    for name, (world, settings) in runs.items():
        (tmp_path / name).mkdir()
        ranks(world, small_glm.train, str(tmp_path / name), {"aligned": True, **settings})
    found = xtrain_align(tmp_path / "one", tmp_path / "two", policy="exact", update=False)
    assert found.curve.bit_identical == STEPS


# ---------------------------------------------------------------- what must be caught


def _caught(check: Any) -> str:
    """What the failing test says."""
    with pytest.raises(pytest.fail.Exception) as caught:
        check(update=False)
    return str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(fake("a100-tf32"), id="tf32"),
        pytest.param(fake("ascend910b-hf32"), id="hf32"),
        pytest.param({"bf16": True}, id="bf16"),
        pytest.param(
            {"aligned": True, **fake("a100-tf32", numerics={"switchable": False})}, id="aligned-tf32"
        ),
    ],
)
def test_coarser_products_are_outside(
    ranks: Any, check: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    ranks(2, small_glm.train, str(tmp_path), settings)
    said = _caught(check)
    assert said.startswith("# Loss curves: not aligned")
    assert "in phase forward of step 1:" in said


HIT = f"config.xtrain.fake.faults | (absent) | [{{'step': {STEP}"


@pytest.mark.parametrize(
    ("fault", "departs", "phase", "hint"),
    [
        pytest.param(
            {"kind": "bit_flip", "name": f"{BLOCK}.weight", "bit": 25},
            STEP,
            "forward",
            f"rank 1 departs alone at step {STEP}",
            id="parameter",
        ),
        pytest.param(
            {"kind": "bit_flip", "name": f"{BLOCK}.weight", "bit": 30, "target": "gradient"},
            STEP + 1,
            "gradient",
            f"the gradient norm departs at step {STEP}, before the loss",
            id="gradient",
        ),
        pytest.param(
            {"kind": "bit_flip", "name": BLOCK, "bit": 24, "target": "activation"},
            STEP,
            "forward",
            f"rank 1 departs alone at step {STEP}",
            id="activation",
        ),
        pytest.param(
            {"kind": "nan", "name": BLOCK, "target": "activation"},
            STEP,
            "forward",
            f"the candidate's loss is not finite at step {STEP}",
            id="nan",
        ),
    ],
)
def test_a_fault_is_found(
    ranks: Any, check: Any, tmp_path: Path, fault: dict[str, Any], departs: int, phase: str, hint: str
) -> None:
    ranks(2, small_glm.train, str(tmp_path), faulty(element=77, **fault))
    said = _caught(check)
    assert said.startswith("# Loss curves: not aligned")
    assert f"the curves part at step {departs}:" in said
    assert f"the first module that departs is {BLOCK}, in phase {phase} of step {STEP}" in said
    assert hint in said
    assert HIT in said


def test_a_fault_between_two_measurements(ranks: Any, check: Any, tmp_path: Path) -> None:
    """The loss tells the step; the modules tell the next measured one."""
    flip = {"kind": "bit_flip", "name": f"{BLOCK}.weight", "bit": 25, "element": 77, "step": STEP + 5}
    ranks(2, small_glm.train, str(tmp_path), {**faulty(**flip), "stage": 0})
    said = _caught(check)
    assert f"the curves part at step {STEP + 5}:" in said
    assert f"of step {STEP + 10}:" in said


def _ends(folder: str, settings: dict[str, Any]) -> str:
    try:
        small_glm.train(folder, settings)
    except TrainingError as error:
        return str(error)
    return "trained"


def test_a_run_that_stops_early_is_no_aligned_run(ranks: Any, check: Any, tmp_path: Path) -> None:
    """Its record agrees as far as it goes; so does that of a run with a killed rank."""
    nan = faulty(kind="nan", name=f"{BLOCK}.weight", target="gradient")
    for message in ranks(2, _ends, str(tmp_path), {**nan, "stage": 0}):
        assert f"step {STEP}" in message
    said = _caught(check)
    assert f"the reference ends at step {STEPS} and the candidate at step {STEP - 1}" in said
    assert check(update=False, steps=STEP - 1).curve.steps == STEP - 1
