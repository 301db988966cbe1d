"""The hint that one rank departs alone: for what only that rank has, and not for coarse losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.align.records import make
from xtrain.align.compare import Policy, compare
from xtrain.align.hints import hints
from xtrain.align.record import Floats, Record

STEPS, RANKS = 60, 2
_WORLD: list[dict[str, Any]] = [{"world_size": RANKS}]


def _rounded(values: Floats, dtype: torch.dtype) -> Floats:
    return np.asarray(torch.from_numpy(values).to(dtype).double().numpy())


def _base() -> Floats:
    return np.asarray(3 + np.random.default_rng(0).uniform(0, 1, (RANKS, STEPS)))


def _record(by_rank: Floats) -> Record:
    losses = by_rank.mean(axis=0).tolist()
    ranks = {f"loss_by_rank.{rank}": row.tolist() for rank, row in enumerate(by_rank)}
    return make(dict(zip(range(1, STEPS + 1), losses, strict=True)), headers=_WORLD, **ranks)


def _hint(one: Floats, two: Floats, policy: str) -> str | None:
    reference, candidate = _record(one), _record(two)
    outcome = compare(reference, candidate, Policy.parse(policy))
    assert not outcome.aligned
    found = [hint for hint in hints(reference, candidate, outcome) if "departs alone" in hint]
    return found[0] if found else None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", ["exact", "relative:1e-4", "relative:0.02"])
def test_a_fault_of_all_ranks_is_not_one_ranks_in_16_bits(dtype: torch.dtype, policy: str) -> None:
    """Losses of 16 bits differ by whole units of their grid: on one rank sooner than on the other."""
    for micro_batches in (1, 2, 3, 4, 7):
        for seed in range(10):
            draw = np.random.default_rng(seed)
            shape = (micro_batches, RANKS, STEPS)
            grown = 1 + 1e-3 * np.exp(np.arange(STEPS) / 10) * draw.standard_normal(shape)
            parts = np.broadcast_to(_base(), shape) * (1 + 0.1 * draw.standard_normal(shape))
            one = _rounded(parts, dtype).mean(axis=0)
            assert _hint(one, _rounded(parts * grown, dtype).mean(axis=0), policy) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("policy", ["exact", "relative:1e-4", "relative:0.01"])
def test_a_fault_of_one_rank_is_still_told(dtype: torch.dtype, policy: str) -> None:
    one = _rounded(_base(), dtype)
    broken = one.copy()
    broken[1, 30:] = _rounded(one[1:, 30:] * 1.5, dtype)[0]
    hint = _hint(one, broken, policy)
    assert hint is not None
    assert hint.startswith(
        "rank 1 departs alone at step 31 (by 5.0e-01, the others by at most 0.0e+00, and before"
    )
    assert "look at what only that rank has" in hint


def test_what_ranks_differ_by_before_is_what_counts() -> None:
    """Both runs are correct up to a thousandth; what then happens to one rank has to stand far above that."""
    draw = np.random.default_rng(1)
    one = _base()
    two = one * (1 + 1e-3 * draw.uniform(-1, 1, one.shape))
    two[0, 40], two[1, 40] = one[0, 40] * 1.005, one[1, 40]
    assert _hint(one, two, "relative:1e-4") is None
    two[0, 40] = one[0, 40] * 1.5
    hint = _hint(one, two, "relative:0.01")
    assert hint is not None
    assert "rank 0 departs alone at step 41" in hint
