"""Names of the modules of wrapped models, and the projection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests import toys
from xtrain.align.module_table import STATISTICS
from xtrain.align.record import read_record
from xtrain.align.recorder import Recorder
from xtrain.align.statistics import measure, plain_name


def _wrapped(folder: str, kind: str) -> None:
    torch.manual_seed(0)
    model = toys.ThreeModules()
    trained: Any = model
    if kind == "ddp":
        trained = nn.parallel.DistributedDataParallel(model)
    elif kind == "compiled":
        trained = torch.compile(model, backend="eager")
    with Recorder(Path(folder, f"{kind}.jsonl"), model=trained, modules_every=1) as recorder:
        for step in range(2):
            loss = trained(torch.full((4, 3), step + 1.0)).square().mean()
            loss.backward()
            recorder.step(loss=loss)


def test_a_wrapped_model_has_the_names_of_its_own(ranks: Any, tmp_path: Path) -> None:
    """DistributedDataParallel and torch.compile put names before them, which the other run does not have."""
    kinds = ("bare", "ddp", "compiled")
    for kind in kinds:
        ranks(1, _wrapped, str(tmp_path), kind)
    tables = [read_record(tmp_path / f"{kind}.jsonl").modules for kind in kinds]
    bare = tables[0]
    assert bare is not None
    assert bare.names == ["first", "act", "second"]
    for table in tables[1:]:
        assert table is not None
        assert table.names == bare.names
        for statistic in STATISTICS:
            key = ("forward", statistic)
            np.testing.assert_array_equal(table.values[key], bare.values[key])


def test_names_without_the_wrappers_of_torch() -> None:
    name = "model._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module._orig_mod.mlp.module"
    assert plain_name(name) == "model.layers.0.mlp.module"  # which may be the model's own


def test_the_projection_sees_what_means_do_not(tmp_path: Path) -> None:
    """Each element moves by 1e-3 of itself, up or down: means keep their values to a part in a hundred thousand."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(400, 256, generator=draw, dtype=torch.float64) + 1
    moved = x * (1 + 1e-3 * (2 * torch.randint(0, 2, x.shape, generator=draw) - 1))
    before, after = measure(x), measure(moved)
    changes = (after - before).abs()
    assert float(changes[0] / before[1]) < 1e-5
    projected = float(changes[5]) / float(before[2])  # both over the root of the number of elements
    assert 1e-4 < projected < 4e-3


def _tensor_parallel(path: str) -> None:
    model = toys.ThreeModules()
    model.second.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    with Recorder(path, model=model, modules_every=1) as recorder:
        loss = model(torch.ones(4, 3)).sum()
        loss.backward()
        recorder.step(loss=loss)


def test_no_projection_where_ranks_hold_parts_of_the_features(tmp_path: Path) -> None:
    _tensor_parallel(str(tmp_path / "r.jsonl"))
    table = read_record(tmp_path / "r.jsonl").modules
    assert table is not None
    assert "projection" not in table.statistics("forward")
    assert "rms" in table.statistics("forward")
