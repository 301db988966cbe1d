"""Schedules of difficulty, against tables by hand and the formula in exact numbers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtrain.base.errors import ConfigError
from xtrain.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler


def _made(kind: str, low: int, high: int, schedule: dict[str, Any]) -> CurriculumScheduler:
    named = {
        "min_difficulty": low,
        "max_difficulty": high,
        "schedule_type": kind,
        "schedule_config": schedule,
    }
    return CurriculumScheduler(named)


def test_fixed_discrete() -> None:
    found = _made("fixed_discrete", 1, 3, {"difficulty": [1, 2, 3], "max_step": [5, 10]})
    assert [found.update_difficulty(step) for step in (1, 5, 6, 10, 11, 99)] == [1, 1, 2, 2, 3, 3]
    assert found.update_difficulty(1) == found.get_current_difficulty() == 3  # it does not come back


def test_fixed_root() -> None:
    found = _made("fixed_root", 8, 64, {"total_curriculum_step": 100, "difficulty_step": 8, "root_degree": 2})
    # 8 + 56 sqrt(step / 100), cut to multiples of 8
    assert [found.get_difficulty(step) for step in (0, 1, 4, 25, 81, 100, 500)] == [8, 8, 16, 32, 56, 64, 64]


@given(st.integers(1, 40), st.integers(0, 60), st.integers(1, 16), st.integers(1, 50), st.integers(0, 80))
def test_fixed_linear(low: int, more: int, unit: int, total: int, step: int) -> None:
    high = low + more
    found = _made("fixed_linear", low, high, {"total_curriculum_step": total, "difficulty_step": unit})
    reached = Fraction(step, total) * more + low
    first = next(n for n in range(low, low + unit) if n % unit == 0)
    expected = min(max([first, *(n for n in range(first, int(reached) + 1, unit))]), high)
    if Fraction(reached).denominator > 1 or step % total == 0:  # else floats may fall on either side of it
        assert found.get_difficulty(step) == expected


def test_states_and_own_schedules() -> None:
    found = CurriculumScheduler({"min_difficulty": 2, "max_difficulty": 9, "schedule_type": "custom"})
    with pytest.raises(ConfigError, match="call set_custom_get_difficulty"):
        found.get_difficulty(3)
    found.set_custom_get_difficulty(lambda step: step + 1)
    assert found.update_difficulty(4) == 5
    other = CurriculumScheduler({"min_difficulty": 2, "max_difficulty": 9, "schedule_type": "custom"})
    other.set_state(found.get_state())
    assert other.get_current_difficulty() == 5


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"min_difficulty": 1}, "the curriculum has no 'max_difficulty'"),
        ({"min_difficulty": 1, "max_difficulty": 2, "schedule_type": "fixed_rot"}, "did you mean 'fixed_root'"),
        ({"min_difficulty": 1, "max_difficulty": 2, "schedule_type": "fixed_root"}, "no 'total_curriculum_step'"),
        (
            {"min_difficulty": 1, "max_difficulty": 2, "schedule_type": "fixed_discrete",
             "schedule_config": {"difficulty": [1], "max_step": [1]}},
            "one max_step less",
        ),
    ],
)  # fmt: skip
def test_mistakes(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CurriculumScheduler(config)
