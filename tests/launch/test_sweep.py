"""`xtrain launch --multirun`: Hydra makes the combinations; what a run is, is replaced by a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xtrain import cli
from xtrain.launch import sweep
from xtrain.launch.job import Job


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, float, list[str]]]:
    made: list[tuple[str, float, list[str]]] = []

    def carry_out(
        job: Job, tree: Any, overrides: list[str], script_args: list[str], *_: Any
    ) -> tuple[int, None]:
        job.run_dir.mkdir(parents=True, exist_ok=True)  # Hydra has made it
        rate = job.deepspeed_config["optimizer"]["params"]["lr"]
        (job.run_dir / "metrics.jsonl").write_text(f'{{"type": "step", "step": 7, "loss": {rate * 100}}}\n')
        made.append((job.run_dir.name, rate, script_args))
        return (1 if rate == 0.03 else 0), None

    monkeypatch.setattr(sweep, "carry_out", carry_out)
    monkeypatch.chdir(tmp_path)
    return made


def test_every_combination_is_run_and_told(
    runs: list[tuple[str, float, list[str]]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status = cli.main(
        [
            "launch",
            "--multirun",
            "hydra.sweep.dir=sweep",
            "train.lr=0.01,0.02,0.03",
            "train.steps=9",
            "--",
            "--mine",
        ]
    )
    assert runs == [("0", 0.01, ["--mine"]), ("1", 0.02, ["--mine"]), ("2", 0.03, ["--mine"])]
    assert status == 1
    told = capsys.readouterr().out
    table = told[told.index("settings") :]
    assert "train.lr=0.02" in table
    assert "train.steps=9" not in table  # all have it
    for expected in (
        "1.0000",
        "2.0000",
        "3.0000",
        "done",
        "status 1",
        f"everything is in {tmp_path / 'sweep'}",
    ):
        assert expected in told


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train.lrr=1,2"], "unknown key 'train.lrr': did you mean 'train.lr'?"),
        (
            ["run_dir=x", "train.lr=1,2"],
            "run_dir= is for one run: with --multirun, hydra.sweep.dir=FOLDER says",
        ),
        (["hydra/launcher=nowhere", "train.lr=1,2"], "no installed package brings hydra/launcher=nowhere"),
        (["--config-dir", "nowhere", "train.lr=1,2"], "--config-dir nowhere is not a folder"),
    ],
)
def test_mistakes(
    runs: list[tuple[str, float, list[str]]], capsys: pytest.CaptureFixture[str], args: list[str], said: str
) -> None:
    assert cli.main(["launch", "--multirun", *args]) == 2
    assert f"xtrain: error: {said}" in capsys.readouterr().err
    assert runs == []


def test_a_run_that_cannot_be_started_is_a_line_of_the_table(
    runs: list[tuple[str, float, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", "--multirun", "train.micro_batch_size=3,8"]) == 2
    told = " ".join(capsys.readouterr().out.split())
    assert "is not divisible by" in told
    assert len(runs) == 1


def test_plug_ins_without_a_sweep_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "--dry-run", "hydra/launcher=submitit_slurm"]) == 2
    assert "is for sweeps: say --multirun" in capsys.readouterr().err
