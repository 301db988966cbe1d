"""Difficulty by step, for curricula that a script applies itself (https://arxiv.org/abs/2108.06084)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from xtrain.base.errors import ConfigError, unknown_name

_NEEDED = {
    "fixed_discrete": ("difficulty", "max_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "custom": (),
}


class CurriculumScheduler:
    """Says how difficult samples may be at a step: for example, how long.

    Args:
        config: `min_difficulty`, `max_difficulty`, `schedule_type` and, unless that is "custom", `schedule_config`:
            "fixed_discrete": lists `difficulty` and `max_step`, the last step of each but the last;
            "fixed_root": from minimum to maximum in `total_curriculum_step` by a root of degree `root_degree`, in
            multiples of `difficulty_step`; "fixed_linear": by a root of degree 1.

    Raises:
        ConfigError: a key is missing, or the lists do not fit.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        for key in ("min_difficulty", "max_difficulty", "schedule_type"):
            if key not in config:
                raise ConfigError(f"the curriculum has no {key!r}")
        kind = config["schedule_type"]
        if kind not in _NEEDED:
            raise ConfigError(
                f"the curriculum's schedule_type: {unknown_name('schedule', str(kind), _NEEDED)}"
            )
        self.state = {key: config[key] for key in ("min_difficulty", "max_difficulty", "schedule_type")}
        self.state["current_difficulty"] = config["min_difficulty"]
        self.custom_get_difficulty: Callable[[int], Any] | None = None
        if kind != "custom":
            schedule = config.get("schedule_config", {})
            for key in _NEEDED[kind]:
                if key not in schedule:
                    raise ConfigError(f"the curriculum's schedule_config has no {key!r}, which {kind} needs")
            if (
                kind == "fixed_discrete"
                and not 1 < len(schedule["difficulty"]) == len(schedule["max_step"]) + 1
            ):
                raise ConfigError(
                    "the curriculum's schedule_config needs one max_step less than difficulties"
                )
            self.state["schedule_config"] = schedule

    def set_custom_get_difficulty(self, schedule_function: Callable[[int], Any]) -> None:
        """The function from step to difficulty of a "custom" schedule."""
        self.custom_get_difficulty = schedule_function

    def get_difficulty(self, global_steps: int) -> Any:
        """The difficulty at a step, which is not remembered.

        Raises:
            ConfigError: the schedule is "custom", and no function was set.
        """
        kind, schedule = self.state["schedule_type"], self.state.get("schedule_config", {})
        if kind == "fixed_discrete":
            passed = sum(global_steps > last for last in schedule["max_step"])
            return schedule["difficulty"][passed]
        if kind == "custom":
            if self.custom_get_difficulty is None:
                raise ConfigError(
                    "the curriculum's schedule is custom: call set_custom_get_difficulty(function) first"
                )
            return self.custom_get_difficulty(global_steps)
        return self._by_root(global_steps, schedule, schedule["root_degree"] if kind == "fixed_root" else 1)

    def _by_root(self, step: int, schedule: Mapping[str, Any], degree: float) -> int:
        lowest, highest, unit = (
            self.state["min_difficulty"],
            self.state["max_difficulty"],
            schedule["difficulty_step"],
        )
        reached = math.floor(
            (step / schedule["total_curriculum_step"]) ** (1 / degree) * (highest - lowest) + lowest
        )
        # A multiple of the unit, and no less than the first one that the minimum allows.
        return int(min(max(reached - reached % unit, math.ceil(lowest / unit) * unit), highest))

    def update_difficulty(self, global_steps: int) -> Any:
        """Go on to a step; the difficulty never leaves the maximum again."""
        if self.state["current_difficulty"] < self.state["max_difficulty"]:
            self.state["current_difficulty"] = self.get_difficulty(global_steps)
        return self.state["current_difficulty"]

    def get_current_difficulty(self) -> Any:
        """That of the last update."""
        return self.state["current_difficulty"]

    def set_current_difficulty(self, difficulty: Any) -> None:
        """Take another one."""
        self.state["current_difficulty"] = difficulty

    def get_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.state = state
