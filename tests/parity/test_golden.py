"""xtrain's curves against the recorded ones of real DeepSpeed and of float64 PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import xtrain
from tests.parity.cases import CASES, GOLDEN, case_name, flags, load_script, write_config
from tests.parity.corpus import write_corpus
from tests.parity.float64 import float64_curve
from tests.parity.record import largest_difference


@pytest.fixture(scope="module")
def golden() -> dict[str, list[float]]:
    recorded = json.loads(GOLDEN.read_text())["curves"]
    return {case: [float.fromhex(loss) for loss in curve] for case, curve in recorded.items()}


def _run_example(folder: str, dtype: str, ranks: int) -> list[float]:
    config = write_config(Path(folder) / str(xtrain.comm.get_rank()), dtype, torch_adam=False)
    script = load_script("xtrain")
    return script.main([*flags(Path(folder) / "corpus.txt"), "--deepspeed_config", str(config)])


@pytest.mark.parametrize(("dtype", "ranks_"), CASES)
def test_against_real_deepspeed(ranks: Any, tmp_path: Path, golden: Any, dtype: str, ranks_: int) -> None:
    write_corpus(tmp_path)
    for rank in range(ranks_):
        (tmp_path / str(rank)).mkdir()
    ours = ranks(ranks_, _run_example, str(tmp_path), dtype, ranks_)[0]
    theirs, exact = golden[case_name(dtype, ranks_)], golden["float64"]
    apart = largest_difference(ours, theirs)
    if dtype == "fp32":
        assert apart < 1e-4
        assert largest_difference(ours, exact) < 1e-5
    else:
        assert apart < 0.02 or largest_difference(ours, exact) < largest_difference(theirs, exact)


def _float64(folder: str) -> list[float]:
    return float64_curve(Path(folder) / "corpus.txt")


def test_the_recorded_float64_curve_is_reproduced(ranks: Any, tmp_path: Path, golden: Any) -> None:
    """Guards the recording itself: same corpus, tokens, samples, model and initialisation as then."""
    write_corpus(tmp_path)
    assert ranks(1, _float64, str(tmp_path))[0] == pytest.approx(golden["float64"], rel=1e-9)
