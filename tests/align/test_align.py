"""Records and comparisons."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import xtrain
from tests import training
from xtrain import cli
from xtrain.align.compare import Policy, compare
from xtrain.align.record import Record, read_record
from xtrain.align.recorder import Recorder
from xtrain.errors import NotImplementedYetError, RecordError


def _write(path: Path, losses: dict[int, float]) -> Path:
    lines = [{"type": "header", "version": 1}]
    lines += [
        {"type": "step", "step": step, "loss": loss, "loss_hex": loss.hex()} for step, loss in losses.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _record(losses: dict[int, float]) -> Record:
    steps = {step: {"loss_hex": loss.hex()} for step, loss in losses.items()}
    return Record(Path("x"), [{}], steps)  # type: ignore[arg-type]


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
    line = record.steps[3]
    assert line["tokens"] == training.GLOBAL_BATCH * 10
    assert line["lr"][0] > 0
    assert line["grad_norm"] > 0
    assert line["applied"] is True


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
    path = _write(tmp_path / "r.jsonl", {1: 1.0, 2: 0.9, 3: 0.8})
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
        (b"\xff\x00rubbish", "cannot be read"),
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


def test_comparison_of_curves() -> None:
    reference = _record({1: 2.0, 2: 1.0, 3: 0.5, 9: 0.1})
    outcome = compare(reference, _record({1: 2.0, 2: 1.01, 3: 0.5}), Policy(0.02))
    assert outcome.aligned
    assert "1 steps stand in one record only" in outcome.sentence()
    assert (outcome.steps, outcome.bit_identical, outcome.largest_step) == (3, 2, 2)
    assert outcome.largest == pytest.approx(0.01)
    assert outcome.mean == pytest.approx(0.01 / 3)
    parted = compare(reference, _record({1: 2.0, 2: 1.05, 3: 0.9}), Policy(0.02))
    assert (parted.aligned, parted.first_outside) == (False, 2)
    assert "part at step 2" in parted.sentence()
    assert "to the last bit" in compare(reference, reference, Policy(0.0)).sentence()


def test_nan_is_only_equal_to_nan() -> None:
    assert compare(_record({1: math.nan}), _record({1: math.nan}), Policy(0.0)).aligned
    assert not compare(_record({1: 1.0}), _record({1: math.nan}), Policy(0.5)).aligned
    assert not compare(_record({1: math.inf}), _record({1: 1.0}), Policy(0.5)).aligned


def test_policies() -> None:
    assert Policy.parse("exact").tolerance == 0
    assert Policy.parse("relative:0.02").tolerance == 0.02
    for text in ("relative", "relative:x", "relative:-1", "relative:nan", "absolute:1"):
        with pytest.raises(RecordError, match="unknown policy"):
            Policy.parse(text)
    with pytest.raises(NotImplementedYetError, match="envelope"):
        Policy.parse("envelope")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = _write(tmp_path / "a.jsonl", {1: 2.0, 2: 1.0})
    two = _write(tmp_path / "b.jsonl", {1: 2.0, 2: 1.1})
    picture = tmp_path / "p.png"
    assert cli.main(["align", str(one), str(one), "--policy", "exact"]) == 0
    assert cli.main(["align", str(one), str(two), "--plot", str(picture)]) == 1
    assert "part at step 2" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["align", str(one), str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["align", str(one), str(_write(tmp_path / "c.jsonl", {7: 1.0}))]) == 2
    assert "no step in common" in capsys.readouterr().err
