"""Curves of other tools, told apart by content."""

from __future__ import annotations

import csv
import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.align.records import write
from xtrain.align.alignment import align
from xtrain.align.compare import Policy, compare
from xtrain.align.sources import read_curve
from xtrain.align.sources.digits import digits_of, half_units
from xtrain.base.errors import RecordError

_CURVES = st.dictionaries(
    st.integers(0, 10**6), st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=30
)


def _file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@given(_CURVES, st.sampled_from([",", "\t", ";"]), st.randoms())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_csv_round_trip_in_any_order(tmp_path: Path, curve: dict[int, float], mark: str, random: Any) -> None:
    rows = list(curve.items())
    random.shuffle(rows)
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=mark)
        writer.writerow(["Step", "my run - train/loss", "my run - train/loss__MIN", "my run - eval/loss"])
        writer.writerows([step, repr(loss), 0, 9] for step, loss in rows)
    record = read_curve(tmp_path / "x.csv")
    assert record.losses() == curve
    assert record.step.tolist() == sorted(curve)


def test_digits_that_were_written() -> None:
    assert digits_of(["2.3456", "12.3"]) == (4, 5)
    assert digits_of(["6.512345E+00", "6.5E-03"]) == (6, 7)
    assert digits_of(["1e-05"]) == (5, 1)
    assert digits_of(["0.12345678901234567", "0.5"]) is None
    assert digits_of(["3"]) is digits_of(["nan"]) is digits_of([]) is None
    # Fixed decimals: half of the last one, whatever the number. Significant digits: half of the last of each.
    values = np.array([123.4, 1.234, 0.0])
    assert half_units(values, (1, 4)).tolist() == [0.05, 0.05, 0.05]
    assert half_units(values, (6, 4)) == pytest.approx([0.05, 0.0005, 5e-7])


def test_rounded_numbers_are_equal_as_far_as_they_were_written(tmp_path: Path) -> None:
    exact = {step: 2.0 + math.sin(step) for step in range(1, 20)}
    record = read_curve(write(tmp_path / "r.jsonl", exact))
    text = "step,loss\n" + "".join(f"{step},{loss:.3f}\n" for step, loss in exact.items())
    rounded = read_curve(_file(tmp_path, "x.csv", text))
    assert compare(record, rounded, Policy("exact")).aligned
    text = text.replace("\n7,2.657\n", "\n7,2.658\n")
    assert compare(record, read_curve(_file(tmp_path, "x.csv", text)), Policy("exact")).first_outside == 7


def test_trainer_state(tmp_path: Path) -> None:
    history = [
        {"step": 1, "loss": 2.5, "grad_norm": 1.5, "learning_rate": 1e-3, "epoch": 0.1},
        {"step": 1, "eval_loss": 9.0},
        {"step": 10, "loss": 2.25, "grad_norm": 1.25, "learning_rate": 5e-4, "epoch": 0.2},
        {"step": 10, "train_loss": 2.4, "train_runtime": 1.0},
    ]
    folder = tmp_path / "out" / "checkpoint-2"
    folder.mkdir(parents=True)
    _file(folder, "trainer_state.json", json.dumps({"log_history": history, "logging_steps": 10}))
    record = read_curve(tmp_path / "out")
    assert record.losses() == {1: 2.5, 10: 2.25}
    assert record.column("lr").tolist() == [1e-3, 5e-4]
    assert record.column("grad_norm").tolist() == [1.5, 1.25]
    assert record.begins is not None
    assert record.begins.tolist() == [0, 1]  # logging_first_step
    assert "its losses are means over 10 steps" in record.notes


def test_megatron_log(tmp_path: Path) -> None:
    text = """> building model ...
 [2026-11-20 10:00:00] iteration        1/     100 | consumed samples:           32 | elapsed time per iteration (ms): 900.1 | learning rate: 1.500000E-06 | global batch size:    32 | lm loss: 1.090210E+01 | loss scale: 4294967296.0 | grad norm: 12.345 | number of skipped iterations:   0 | number of nan iterations:   0 |
time (ms)
 [2026-11-20 10:00:01] iteration        2/     100 | consumed samples:           64 | learning rate: 3.000000E-06 | loss scale: 2147483648.0 | grad norm: 1.5 | number of skipped iterations:   1 |
 iteration        3/     100 | learning rate: 4.500000E-06 | lm loss: 9.5E+00 | loss scale: 2147483648.0 | grad norm: 11.0 |
"""  # noqa: E501 - as Megatron writes it
    record = read_curve(_file(tmp_path, "train.log", text))
    assert record.kind == "Megatron log"
    assert record.losses() == {1: 10.9021, 3: 9.5}
    assert record.column("loss_scale").tolist() == [4294967296.0, 2147483648.0]
    assert record.column("grad_norm").tolist() == [12.345, 11.0]


def test_json_lines_with_values_on_lines_of_their_own(tmp_path: Path) -> None:
    rows = [{"_step": 0, "loss": 1.5}, {"_step": 0, "lr": 0.1}, {"_step": 1, "loss": 1.25, "lr": 0.2}]
    record = read_curve(_file(tmp_path, "h.jsonl", "\n".join(map(json.dumps, rows)) + '\n{"_step": 2, "lo'))
    assert record.losses() == {0: 1.5, 1: 1.25}
    assert record.column("lr").tolist() == [0.1, 0.2]
    assert record.notes == ["its last line was cut off"]


def _leaf(largest: float, mean: float, norm: float, shape: list[int]) -> dict[str, Any]:
    return {"type": "torch.Tensor", "shape": shape, "Max": largest, "Min": -1.0, "Mean": mean, "Norm": norm}


def _dump(folder: Path, step: int, factor: float) -> None:
    place = folder / f"step{step}" / "rank0"
    place.mkdir(parents=True)
    name = "Module.layers.0.mlp.Linear"
    data = {
        f"{name}.forward.0": {
            "input_args": [_leaf(9.0, 9.0, 9.0, [2])],
            "output": [_leaf(3.0 * factor, 0.5 * factor, 8.0 * factor, [4, 4])],
            "parameters": {"weight": _leaf(2.0, 0.25, 4.0, [4]), "bias": _leaf(0.5, 1.25, 3.0, [4])},
        },
        f"{name}.backward.0": {"input": [_leaf(0.1, 0.01, 0.4, [4, 4])], "output": [None]},
        f"{name}.parameters_grad": {"weight": [_leaf(0.1, 0.01, 0.4, [4])]},
        "Functional.relu.0.forward": {"output": [_leaf(1.0, 1.0, 1.0, [2])]},
    }
    content = {"task": "statistics", "level": "mix", "framework": "pytorch", "data": data}
    (place / "dump.json").write_text(json.dumps(content))


def test_msprobe_dumps_are_compared_by_their_modules(tmp_path: Path) -> None:
    for name, factor in (("a", 1.0), ("b", 1.5)):
        _dump(tmp_path / name, 0, 1.0)
        _dump(tmp_path / name, 1, factor)
    table = read_curve(tmp_path / "a").modules
    assert table is not None
    assert table.names == ["layers.0.mlp"]
    assert table.values["forward", "rms"][:, 0].tolist() == [2.0, 2.0]  # 8 / sqrt(16)
    assert table.values["forward", "max_abs"][0, 0] == 3.0
    # Weight and bias together: the mean of both, and the norm of both over eight elements.
    assert table.values["optimizer", "mean"][0, 0] == 0.75
    assert table.values["optimizer", "rms"][0, 0] == pytest.approx(math.sqrt(25 / 8))
    assert table.steps["optimizer"].tolist() == [-1, 0]  # they are those before the update
    alike = align(tmp_path / "a", tmp_path / "a")
    assert alike.aligned
    apart = align(tmp_path / "a", tmp_path / "b")
    assert not apart.aligned
    assert apart.modules is not None
    assert apart.modules.first is not None
    assert (apart.modules.first.step, apart.modules.first.phase) == (1, "forward")
    with pytest.raises(RecordError, match="nothing can be compared"):
        align(tmp_path / "a", write(tmp_path / "r.jsonl", {1: 1.0}))


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(5):
            writer.add_scalar("train/loss", 1.0 / (step + 1), step)
            writer.add_scalar("train/lr", 0.1, step, new_style=True)
            writer.add_scalar("eval/loss", 7.0, step)
    record = read_curve(tmp_path)
    assert record.kind == "TensorBoard events"
    assert record.losses() == {step: float(np.float32(1.0 / (step + 1))) for step in range(5)}
    assert record.column("lr").tolist() == [float(np.float32(0.1))] * 5
    assert read_curve(next(tmp_path.glob("events*"))).losses() == record.losses()


def test_events_without_tensorboard_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = b"\x09\0\0\0\0\0\0\0\0\x1a\x0dbrain.Event:2"
    path = _file(tmp_path, "anything", struct.pack("<Q", len(event)) + b"crc_" + event + b"crc_")
    module = "tensorboard.backend.event_processing.event_accumulator"
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecordError, match="pip install tensorboard"):
        read_curve(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x00\xff\xfe rubbish \x9c", "neither text nor TensorBoard"),
        (b"", "is empty"),
        (b"hello\nworld\n", "no curve that is known"),
        (b'{"a": 1}', "no curve that is known"),
        (b'{"log_history": 3}', "not a list of rows"),
        (b'{"log_history": [{"loss": 1.0}]}', "has no step"),
        (b'{"log_history": []}', "no column that looks like a training loss"),
        (b"step,accuracy\n1,2.0\n", "choose one of accuracy with --loss"),
        (b"step,train/loss,other/loss\n1,2.0,3.0\n", "several curves"),
        (b"step,loss\n1,2.0\nx\n2,1.0\n", "line 3 does not fit"),
        (b"step,loss\n1.5,2.0\n", "not the number of a step"),
        (b"step,loss\ninf,2.0\n", "not the number of a step"),
        (b"step,loss\n1,\n2,\n", "no column that looks like"),
        (b'{"task": "statistics", "data": {}}', "no statistics of modules"),
        (b'{"type": "step", "step": 1, "loss": 1.0}\n', "no header"),
        (b'{"type": "header", "version": 3}\n', "version 3, this xtrain reads 1 and 2"),
        (b'{"type": "header", "version": 2}\n{"type": "step", "step": "x"}\n{}\n', "line 2"),
        (b'{"type":"header","version":2}\n[[[[\n{"type": "step", "step": 1}\n', "line 2"),
    ],
)
def test_rubbish_is_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(RecordError, match=said) as caught:
        read_curve(_file(tmp_path, "x", content))
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    for start in (b"", b'{"type": "header", "version": 2}\n', b"step,loss\n", b'{"_step": 1, "loss": 2}\n'):
        path = _file(tmp_path, "x", start + content)
        try:
            record = read_curve(path)
        except RecordError:
            continue
        assert len(record.step) == len(np.unique(record.step)) == len(record.loss)


@given(
    st.dictionaries(st.integers(1, 40), st.floats(1e-3, 1e3), min_size=1), st.integers(0, 400), st.randoms()
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_record_cut_anywhere_keeps_its_whole_lines(
    tmp_path: Path, losses: dict[int, float], cut: int, random: Any
) -> None:
    order = list(losses)
    random.shuffle(order)
    whole = write(tmp_path / "r.jsonl", {step: losses[step] for step in order}).read_bytes()
    header = whole.splitlines(keepends=True)[0]
    content = whole[: max(len(header), len(whole) - cut)]
    kept = content[len(header) :].count(b"\n")
    complete = content.endswith(b"}")  # only the line's end is lost
    record = read_curve(_file(tmp_path, "cut.jsonl", content))
    assert record.losses() == {step: losses[step] for step in sorted(order[: kept + complete])}
    assert ("its last line was cut off" in record.notes) == (not content.endswith((b"\n", b"}")))


def test_the_loss_can_be_named(tmp_path: Path) -> None:
    path = _file(tmp_path, "x.csv", "step,a,b\n1,2.5,3.5\n")
    assert read_curve(path, "b").losses() == {1: 3.5}
    with pytest.raises(RecordError, match="has no column 'bb': did you mean 'b'"):
        read_curve(path, "bb")
