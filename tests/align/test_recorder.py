"""Recording: xtrain's engine, loops with DeepSpeed's method names, loops of one's own; modules; reading it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import xtrain
from tests import toys, training
from tests.align.records import write
from tests.live_deepspeed import live_deepspeed
from xtrain.align.module_table import PHASES, STATISTICS
from xtrain.align.record import read_record
from xtrain.align.recorder import Recorder
from xtrain.align.statistics import measure
from xtrain.base.errors import ConfigError, RecordError


def _recorded(path: str) -> list[float]:
    model = training.build_model()
    settings = training.config(1, micro=4, xtrain={"record": path, "tokens_per_sample": 10})
    engine, _, _, _ = xtrain.initialize(
        model=model, model_parameters=training.param_groups(model), config=settings
    )
    return [training.engine_step(engine, step) for step in range(5)]


def test_the_engine_records_what_the_script_sees(ranks: Any, tmp_path: Path) -> None:
    losses = ranks(2, _recorded, str(tmp_path / "r.jsonl"))[0]
    record = read_record(tmp_path / "r.jsonl")
    assert list(record.losses().values()) == losses  # bit for bit
    assert record.headers[0]["world_size"] == 2
    assert record.headers[0]["config"]["train_batch_size"] == training.GLOBAL_BATCH
    third = {name: column[2] for name, column in record.columns.items()}
    assert third["tokens"] == training.GLOBAL_BATCH * 10
    assert third["lr"] > 0
    assert third["grad_norm"] > 0
    assert third["applied"] == 1
    assert (third["loss_by_rank.0"] + third["loss_by_rank.1"]) / 2 == third["loss"]
    assert record.headers[0]["environment"]["device"] == "cpu"


class PlainLoop:
    """A loop without xtrain, with DeepSpeed's method names: the recorder asks for no more."""

    global_rank, world_size, global_steps, device = 0, 1, 0, "cpu"

    def __init__(self) -> None:
        self.backwards = 0

    def backward(self, loss: Any) -> None:
        self.backwards += 1

    def is_gradient_accumulation_boundary(self) -> bool:
        return self.backwards % 2 == 0

    def step(self) -> None:
        self.global_steps += self.is_gradient_accumulation_boundary()

    def get_lr(self) -> list[float]:
        return [0.1]

    def get_global_grad_norm(self) -> None:
        return None

    def was_step_applied(self) -> bool:
        return True

    def train_batch_size(self) -> int:
        return 4


def test_a_loop_without_xtrain_can_be_recorded(tmp_path: Path) -> None:
    loop = PlainLoop()
    recorder = Recorder(tmp_path / "r.jsonl")
    recorder.attach(loop)
    for value in (1.0, 2.0, 3.0, 5.0):
        loop.backward(torch.tensor(value))
        loop.step()
    recorder.close()
    assert read_record(tmp_path / "r.jsonl").losses() == {1: 1.5, 2: 4.0}


def test_resumed_records_and_cut_off_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {1: 1.0, 2: 0.9, 3: 0.8})
    with path.open("a") as file:
        file.write(json.dumps({"type": "step", "step": 3, "loss": 0.7, "loss_hex": (0.7).hex()}) + "\n")
        file.write('{"type": "step", "ste')
    assert read_record(path).losses() == {1: 1.0, 2: 0.9, 3: 0.7}
    loop = PlainLoop()
    loop.global_steps = 3
    recorder = Recorder(path)
    recorder.attach(loop)
    for _ in range(2):
        loop.backward(torch.tensor(0.5))
        loop.step()
    recorder.close()
    record = read_record(path)
    assert record.losses() == {1: 1.0, 2: 0.9, 3: 0.7, 4: 0.5}
    assert record.headers[-1]["from_step"] == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\x00rubbish", "not a run record"),
        (b"", "no header"),
        (b'{"type": "header", "version": 1}\nrubbish\n{}\n', "line 2"),
        (b'{"type": "header", "version": 9}\n', "version 9"),
        (b"[1]\n[2]\n", "line 1"),
    ],
)
def test_what_is_not_a_record(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=said):
        read_record(path)


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    """Every statistic against float64 by hand."""
    torch.manual_seed(0)
    model = toys.ThreeModules()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected: dict[tuple[str, str], Any] = {}
    with Recorder(tmp_path / "r.jsonl", model=model, modules_every=2, config={"lr": 0.1}) as recorder:
        for step in range(3):
            optimizer.zero_grad()
            for _ in range(2):  # micro-batches: measured as one batch
                hidden = model.first(torch.randn(5, 3))
                out = model.second(model.act(hidden))
                hidden.retain_grad()
                out.retain_grad()
                loss = out.square().mean() / 2
                loss.backward()
                for key, tensor in (
                    (("forward", "first"), hidden), (("forward", "second"), out),
                    (("backward", "first"), hidden.grad), (("backward", "second"), out.grad),
                ):  # fmt: skip
                    expected.setdefault((str(step), *key), []).append(tensor.detach().double().flatten())
            with torch.no_grad(), torch.random.fork_rng():
                model.eval()
                model(torch.full((1, 3), 1e6))  # an evaluation is not part of the step
                model.train()
            expected[str(step), "gradient", "second"] = [
                p.grad.double().flatten() for p in model.second.parameters()
            ]
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            expected[str(step), "optimizer", "first"] = [
                p.detach().double().flatten() for p in model.first.parameters()
            ]
            recorder.step(loss=loss, grad_norm=norm, lr=0.1, tokens=7, my_number=step)
    record = read_record(tmp_path / "r.jsonl")
    assert record.step.tolist() == [1, 2, 3]
    assert record.column("my_number").tolist() == [0, 1, 2]
    assert record.column("lr").tolist() == [0.1] * 3
    assert record.header["config"] == {"lr": 0.1}
    table = record.modules
    assert table is not None
    assert table.names == ["first", "act", "second"]
    assert table.phases() == list(PHASES)
    for (step, phase, name), tensors in expected.items():
        if step == "1":
            continue
        assert table.steps[phase].tolist() == [1, 3]
        x = torch.cat(tensors)
        row, column = int(step) // 2, table.names.index(name)
        found = {key: table.values[phase, key][row, column] for key in ("mean", "abs_mean", "rms", "max_abs")}
        assert found == pytest.approx(
            {
                "mean": x.mean().item(), "abs_mean": x.abs().mean().item(),
                "rms": x.square().mean().sqrt().item(), "max_abs": x.abs().max().item(),
            },
            rel=1e-5, abs=1e-7,
        )  # fmt: skip
        assert table.values[phase, "nonfinite"][row, column] == 0
    assert np.isnan(table.values["gradient", "rms"][0, 1])  # Tanh has no parameters


def test_numbers_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    model = toys.ThreeModules()
    with Recorder(tmp_path / "r.jsonl", model=model, modules_every=1) as recorder:
        x = torch.ones(2, 3)
        x[0, 0] = float("nan")
        recorder.step(loss=model(x).sum())
    table = read_record(tmp_path / "r.jsonl").modules
    assert table is not None
    assert table.values["forward", "nonfinite"][0].tolist() == [4, 4, 2]
    assert np.isnan(table.values["forward", "max_abs"][0]).all()


def test_what_a_recorder_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XTRAIN_RUN_DIR", raising=False)
    with pytest.raises(RecordError, match="needs a path"):
        Recorder()
    with pytest.raises(RecordError, match="modules_every is 0"):
        Recorder(tmp_path / "r", modules_every=0)
    with pytest.raises(RecordError, match="no module is called block"):
        Recorder(tmp_path / "r", model=toys.ThreeModules(), modules_every=1, modules=["block*"])
    with pytest.raises(RecordError, match="one element"):
        Recorder(tmp_path / "r").step(loss=torch.ones(2))


def test_the_run_folder_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTRAIN_RUN_DIR", str(tmp_path / "run"))
    with Recorder() as recorder:
        recorder.step(loss=1.5, step=7)
    record = read_record(tmp_path / "run")
    assert record.losses() == {7: 1.5}
    assert record.header["from_step"] == 6


def _statistics(path: str, stage: int, micro: int, aligned: bool) -> None:
    model = training.build_model()
    record = {"path": path, "modules_every": 2}
    settings = training.config(stage, micro=micro, xtrain={"record": record, "aligned": aligned})
    engine, _, _, _ = xtrain.initialize(
        model=model, model_parameters=training.param_groups(model), config=settings
    )
    for step in range(3):
        training.engine_step(engine, step)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_statistics_do_not_depend_on_stage_and_split(ranks: Any, tmp_path: Path, stage: int) -> None:
    """One rank with stage 0 against two with others; two micro-batches a step against one."""
    ranks(1, _statistics, str(tmp_path / "one.jsonl"), 0, 16, False)
    ranks(2, _statistics, str(tmp_path / "two.jsonl"), stage, 4, False)
    one, two = read_record(tmp_path / "one.jsonl").modules, read_record(tmp_path / "two.jsonl").modules
    assert one is not None
    assert two is not None
    assert one.phases() == two.phases() == list(PHASES)
    for phase in PHASES:
        assert one.steps[phase].tolist() == two.steps[phase].tolist() == [1, 3]
        for statistic in one.statistics(phase):
            expected, found = one.values[phase, statistic], two.values[phase, statistic]
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6, err_msg=f"{phase} {statistic}")


def _managed_or_not(path: str, stage: int, managed: bool) -> None:
    record = {"path": path, "modules_every": 1}
    more = {"managed_gradient_accumulation": managed, "xtrain": {"record": record}}
    engine = xtrain.initialize(model=training.build_model(), config=training.config(stage, **more))[0]
    for step in range(2):
        x, y = training.samples(step)
        for index in range(2):
            first = (engine.grid.rank * 2 + index) * 4
            engine.backward(training.loss_of(engine, x[first : first + 4], y[first : first + 4]))
            if managed or index:
                engine.step()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_measured_where_only_step_ends_a_window(ranks: Any, tmp_path: Path, stage: int) -> None:
    found = []
    for managed in (True, False):
        path = tmp_path / f"{managed}.jsonl"
        ranks(2, _managed_or_not, str(path), stage, managed)
        modules = read_record(path).modules
        assert modules is not None
        assert modules.phases() == list(PHASES)
        found.append(modules)
    for phase in PHASES:
        for statistic in found[0].statistics(phase):
            pair = [one.values[phase, statistic] for one in found]
            np.testing.assert_allclose(pair[1], pair[0], rtol=1e-5, err_msg=f"{phase} {statistic}")


def test_modules_are_in_the_order_in_which_they_ran(tmp_path: Path) -> None:
    class Crosswise(nn.Module):
        """Modules that run in another order than they are registered in, and one that does not run at first."""

        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Linear(3, 3)
            self.unused = nn.Linear(3, 3)
            self.early = nn.Linear(3, 3)
            self.use_all = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.late(self.early(x))
            return self.unused(x) if self.use_all else x

    model = Crosswise()
    with Recorder(tmp_path / "r.jsonl", model=model, modules_every=1) as recorder:
        for step in range(2):
            model.use_all = step == 1
            loss = model(torch.ones(2, 3)).square().mean()
            loss.backward()
            recorder.step(loss=loss)
    modules = read_record(tmp_path / "r.jsonl").modules
    assert modules is not None
    assert modules.names == ["early", "late", "unused"]
    early = model.early(torch.ones(3)).abs().mean().item()
    assert modules.values["forward", "abs_mean"][:, 0].tolist() == pytest.approx([early, early])
    assert np.isnan(modules.values["forward", "rms"][:, 2]).tolist() == [True, False]


def test_names_in_another_order_after_a_restart(tmp_path: Path) -> None:
    def line(names: list[str], step: int, values: list[float]) -> str:
        statistics = dict.fromkeys(STATISTICS, values)
        return "".join(
            json.dumps(entry) + "\n"
            for entry in (
                {"type": "header", "version": 2, "from_step": step - 1},
                {"type": "names", "modules": names},
                {"type": "step", "step": step, "loss": 1.0},
                {"type": "modules", "step": step, "phase": "forward", **statistics},
            )
        )

    file = tmp_path / "r.jsonl"
    file.write_text(line(["a", "b"], 1, [1.0, 2.0]) + line(["b", "a"], 2, [4.0, 3.0]))
    record = read_record(file)
    assert record.modules is not None
    assert record.modules.names == ["a", "b"]
    assert record.modules.values["forward", "rms"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert not record.notes
    assert record.modules.ordered(["b", "a"]).values["forward", "rms"].tolist() == [[2.0, 1.0], [4.0, 3.0]]


def test_norms_of_large_tensors_are_exact() -> None:
    """Mostly zeros, as the gradient of an embedding: a plain sum of squares is off by 1e-4."""
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 31, 2048, 2049):
        x = torch.randn(rows, 128, generator=generator) * (torch.rand(rows, 1, generator=generator) < 0.05)
        for tensor in (x, x.t(), x.bfloat16()):
            exact = float(tensor.double().norm())
            assert float(measure(tensor)[2]) == pytest.approx(exact, rel=1e-6)


def _without_a_path() -> None:
    model = training.build_model()
    settings = training.config(0, micro=16, xtrain={"record": {"modules_every": 2}})
    xtrain.initialize(model=model, model_parameters=training.param_groups(model), config=settings)


def test_a_record_without_a_path_needs_the_launcher(ranks: Any) -> None:
    with pytest.raises(ConfigError, match="has no path"):
        ranks(1, _without_a_path)


def test_a_restart_makes_void_what_came_after_it(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {1: 1.0, 2: 0.9, 3: 0.8, 4: 0.7})
    with path.open("a") as file:
        file.write(json.dumps({"type": "header", "version": 2, "from_step": 2}) + "\n")
        file.write(json.dumps({"type": "step", "step": 3, "loss": 0.5}) + "\n")
    record = read_record(path)
    assert record.losses() == {1: 1.0, 2: 0.9, 3: 0.5}
    assert record.restarts() == [2]


def _alike(path: str, stage: int, precision: dict[str, Any]) -> None:
    """The same three steps on real DeepSpeed and on xtrain, both recorded."""
    config = {
        "train_batch_size": training.GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        **precision,
    }
    rank = xtrain.comm.get_rank()
    with live_deepspeed() as deepspeed:
        for framework in (deepspeed, xtrain):
            model = training.build_model()
            engine, *_ = framework.initialize(model=model, model_parameters=model.parameters(), config=config)
            recorder = Recorder(f"{path}/{framework.__name__}.jsonl", modules_every=2)
            recorder.attach(engine)
            for step in range(3):
                for index in range(2):
                    first = (2 * rank + index) * 4
                    x, y = (t[first : first + 4] for t in training.samples(step))
                    engine.backward(training.loss_of(engine, x, y))
                    engine.step()
            recorder.close()
            engine.destroy()


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (1, {}),
        (3, {}),
        (1, {"fp16": {"enabled": True, "initial_scale_power": 8}}),
        (2, {"bf16": {"enabled": True}}),
    ],
)
def test_real_deepspeed_is_recorded_alike(
    ranks: Any, tmp_path: Path, stage: int, precision: dict[str, Any]
) -> None:
    pytest.importorskip("deepspeed")
    ranks(2, _alike, str(tmp_path), stage, precision)
    theirs, ours = (read_record(tmp_path / f"{name}.jsonl") for name in ("deepspeed", "xtrain"))
    tolerance = 2e-2 if precision else 1e-4
    np.testing.assert_allclose(theirs.loss, ours.loss, rtol=tolerance)
    np.testing.assert_allclose(theirs.column("lr"), ours.column("lr"))
    if "fp16" in precision:
        assert theirs.column("loss_scale").tolist() == ours.column("loss_scale").tolist() == [256.0] * 3
    one, two = theirs.modules, ours.modules
    assert one is not None
    assert two is not None
    assert one.phases() == ["forward", "backward", "optimizer"]  # its averaged gradients are not public
    for phase in one.phases():
        for statistic in ("abs_mean", "rms"):
            np.testing.assert_allclose(
                one.values[phase, statistic], two.values[phase, statistic], rtol=tolerance, err_msg=phase
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (513,), (7, 300), (1024, 1025)])
def test_statistics_of_a_tensor_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Nearly equal elements, of which float32 loses much when it adds them one after the other."""
    draw = torch.Generator().manual_seed(0)
    x = (1 / 96 + 1e-4 * torch.rand(shape, generator=draw)).to(dtype)
    for tensor in (x, x.t() if x.ndim == 2 else x, -x):
        wide = tensor.double()
        exact = [wide.sum(), wide.abs().sum(), wide.square().sum().sqrt(), wide.abs().max(), 0]
        found = measure(tensor).double()
        torch.testing.assert_close(
            found[:5], torch.tensor([float(v) for v in exact]).double(), rtol=1e-6, atol=0
        )
        # One-hot rows read the signs off.
        width = tensor.shape[-1] if tensor.ndim else 1
        signs = torch.tensor([float(measure(row)[5]) for row in torch.eye(width, dtype=torch.float64)])
        assert set(signs.tolist()) <= {1.0, -1.0}
        assert abs(float(found[5] - (wide * signs).sum())) <= 1e-6 * float(wide.abs().sum())
