"""What public repositories import of DeepSpeed: it is there, or can be imported, or is refused by its feature."""

from __future__ import annotations

import importlib

import pytest
from torch import nn

from tests.deepspeed_api.public_names import outcomes, record, share
from xtrain.base import stand_ins
from xtrain.base.errors import NotImplementedYetError


def test_nearly_all_can_be_imported_and_the_rest_is_explained() -> None:
    assert len(record()["repositories"]) >= 40
    found = outcomes()
    assert [item for item in found if item.said.startswith("not explained")] == []
    assert share(found) >= 97


def test_a_stand_in_says_what_to_do_when_it_is_used() -> None:
    from xtrain.runtime.pipe.engine import PipelineEngine
    from xtrain.runtime.pipe.module import PipelineModule
    from xtrain.runtime.pipe.schedule import TrainSchedule

    class Mine(PipelineModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(layers=[])

    assert issubclass(Mine, nn.Module)
    assert not isinstance(nn.Linear(1, 1), PipelineEngine)
    for make in (Mine, lambda: TrainSchedule(1, 2, 3)):
        with pytest.raises(
            NotImplementedYetError, match=r"runtime\.pipe\..* \(pipeline parallelism\) is not"
        ):
            make()
    init_inference = importlib.import_module("xtrain").init_inference
    with pytest.raises(NotImplementedYetError, match="inference and generation"):
        init_inference(nn.Linear(1, 1))
    assert TrainSchedule is importlib.import_module("xtrain.runtime.pipe.schedule").TrainSchedule


def test_a_mistyped_name_is_no_stand_in() -> None:
    with pytest.raises(ImportError, match="pipeline parallelism"):
        importlib.import_module("xtrain.runtime.pipe.shedule")
    module = importlib.import_module("xtrain.runtime.pipe.schedule")
    assert not hasattr(module, "TrainShedule")
    assert stand_ins.get("runtime.pipe.schedule.TrainShedule") is None
