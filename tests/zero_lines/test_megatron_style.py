"""A Megatron-style script made for CUDA, apex and DeepSpeed, with no line changed: real DeepSpeed's curve."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.zero_lines.record import CASES, SCRIPT, arguments, recorded
from xtrain.shims import process


def _run(words: list[str]) -> None:
    """As `xtrain run --device-shim on` does, in a process that is there."""
    before, argv, path = set(sys.modules), sys.argv, list(sys.path)
    process.install("on")
    try:
        sys.argv = [str(SCRIPT), *words]
        sys.path.insert(0, str(SCRIPT.parent))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert ended.value.code == 0
    finally:
        process.uninstall()
        sys.argv, sys.path[:] = argv, path
        for name in {"mpu", "model"} & (set(sys.modules) - before):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("case", "stage"), [*((case, 1) for case in CASES), ("fp32", 0), ("fp32", 2), ("fp32", 3), ("bf16", 3)]
)
def test_curve_is_deepspeeds(ranks: Callable[..., list[Any]], tmp_path: Path, case: str, stage: int) -> None:
    ranks(2, _run, arguments(case, tmp_path, stage))
    ours = json.loads((tmp_path / "losses.json").read_text())
    theirs = recorded(case)
    assert len(ours) == len(theirs) == 30
    assert theirs[-1] < 0.8 * theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-6 if case.startswith("fp32") else 2e-2)
