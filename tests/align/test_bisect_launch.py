"""`xtrain align --bisect` on run folders of `xtrain launch`: ranks replaced by a few lines; and, slow, on real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from tests.align.records import write
from tests.parity.corpus import write_corpus
from xtrain import cli
from xtrain.align import trials
from xtrain.launch.compose import compose_config
from xtrain.launch.job import Job
from xtrain.launch.supervisor import INTERRUPTED

STEPS = 5


class Ranks:
    """In place of the supervisor: writes what ranks with this configuration would record."""

    runs: list[dict[str, Any]] = []
    status = 0
    drift = 0.0

    def __init__(self, job: Job, console: Any, debug: bool) -> None:
        self.job, self.console = job, console

    def run(self) -> int:
        found = json.loads((self.job.run_dir / "ds_config.json").read_text())
        Ranks.runs.append(found)
        self.console.print("a line of the launcher")
        assert {"--log-interval=10", "--a"} & set(self.job.script_args)
        record(self.job.run_dir, found)
        (self.job.run_dir / "checkpoint").mkdir()
        return Ranks.status


def record(folder: Path, config: dict[str, Any]) -> None:
    """What departs is fp16."""
    loss = 2.0 + Ranks.drift + 0.5 * config["fp16"]["enabled"]
    write(folder / "metrics.jsonl", dict.fromkeys(range(1, STEPS + 1), loss), config=config)


@pytest.fixture(autouse=True)
def ranks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setattr(trials, "Supervisor", Ranks)
    monkeypatch.setattr(Ranks, "runs", [])
    monkeypatch.setattr(Ranks, "drift", 0.0)
    monkeypatch.setattr(Ranks, "status", 0)


def _run_folder(path: Path, *overrides: str) -> Path:
    _, tree = compose_config([f"run_dir={path}", f"train.steps={STEPS}", *overrides])
    path.mkdir()
    OmegaConf.save(tree, path / "config.yaml")
    found: Any = OmegaConf.to_container(tree.deepspeed)
    if tree.deepspeed_config:
        found = json.loads(Path(tree.deepspeed_config).read_text())
    (path / "ds_config.json").write_text(json.dumps(found))
    record(path, found)
    return path


HARMLESS = ["parallel=zero2", "train.seed=7", "+cluster.env.SOME=1", "backend=fake_a100_tf32", "train.lr=0.1"]


def _bisect(
    capsys: pytest.CaptureFixture[str], folder: Path, *args: str | Path, options: tuple[str, ...] = ()
) -> tuple[int, str]:
    status = cli.main(["align", "--bisect", *map(str, args), "-o", str(folder), *options])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = _run_folder(tmp_path / "good")
    bad = _run_folder(tmp_path / "bad", "train.precision=fp16", *HARMLESS)
    status, said = _bisect(capsys, tmp_path / "kept", good, bad, options=("--trust",))
    assert status == 1, said
    assert f"the reference is GOOD: {good / 'metrics.jsonl'}" in said
    assert "the departure comes from: train.precision: fp32 -> fp16 (with deepspeed.fp16.enabled)\n" in said
    assert "     train.lr: 0.002 -> 0.1 (with deepspeed.optimizer.params.lr, " in said
    assert "run_dir" not in said
    assert 3 < len(Ranks.runs) < 12
    (rerun,) = (
        f
        for f in (tmp_path / "kept").glob("*/")
        if json.loads((f / "outcome.json").read_text())["settings"] == ["GOOD"]
    )
    assert not (rerun / "checkpoint").exists()
    assert (rerun / "trial.log").read_text() == "a line of the launcher\n"
    again = yaml.safe_load((rerun / "config.yaml").read_text())
    assert again == {**yaml.safe_load((good / "config.yaml").read_text()), "run_dir": str(rerun)}
    # Configurations alone: GOOD is run twice, as nothing is known of it.
    count = len(Ranks.runs)
    status, said = _bisect(capsys, tmp_path / "new", good / "config.yaml", bad / "config.yaml")
    assert status == 1
    assert len(Ranks.runs) == 2 * count + 1


def test_a_mixture_that_cannot_start_costs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = _run_folder(tmp_path / "good", "train.micro_batch_size=8")
    bad = _run_folder(
        tmp_path / "bad", "cluster.ranks_per_node=3", "train.global_batch_size=12", "train.micro_batch_size=4",
        "train.precision=fp16",
    )  # fmt: skip
    status, said = _bisect(capsys, tmp_path / "kept", good, bad)
    assert status == 1
    assert "the departure comes from: train.precision" in said
    assert "without it BAD agrees with GOOD" in said


def test_what_has_changed_since_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = _run_folder(tmp_path / "good"), _run_folder(tmp_path / "bad", "train.seed=7")
    Ranks.drift = 1.0
    status, said = _bisect(capsys, tmp_path / "1", good, bad)
    assert status == 2
    assert "GOOD, run again, does not agree with its own record (relative:0.02, step 1)" in said
    assert f"pass {good / 'config.yaml'}" in said
    status, said = _bisect(capsys, tmp_path / "2", good / "config.yaml", bad / "config.yaml")
    assert status == 0
    status, said = _bisect(capsys, tmp_path / "3", good / "config.yaml", bad)
    assert status == 2
    assert "BAD agrees with GOOD when it is run again, and its own record departs at step 1" in said
    assert "does not come from its settings (and its record shows no other difference)" in said


def test_a_record_that_is_not_whole_is_no_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = _run_folder(tmp_path / "good"), _run_folder(tmp_path / "bad", "train.seed=7")
    write(good / "metrics.jsonl", dict.fromkeys(range(1, STEPS), 2.0))
    status, said = _bisect(capsys, tmp_path / "kept", good, bad)
    assert status == 0
    assert str(good) not in said
    assert len(Ranks.runs) == 3


def test_a_deepspeed_config_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the run had read counts, not what the file has become; and its own script's arguments are kept."""
    (tmp_path / "script.py").touch()
    file = tmp_path / "ds.json"
    own = [f"deepspeed_config={file}", f"script={tmp_path / 'script.py'}", "script_args=[--a,1]"]
    file.write_text('{"train_batch_size": 8, "fp16": {"enabled": false}}')
    good = _run_folder(tmp_path / "good", *own)
    file.write_text(
        json.dumps(
            {"train_batch_size": 8, "fp16": {"enabled": True}, "xtrain": {"record": {"path": "/nowhere/r"}}}
        )
    )
    bad = _run_folder(tmp_path / "bad", *own, "train.lr=1")
    file.unlink()
    status, said = _bisect(capsys, tmp_path / "kept", good, bad)
    assert status == 2
    assert (
        f"says script={tmp_path / 'script.py'}, which decides what is run, and was not written by your"
        in said
    )
    status, said = _bisect(capsys, tmp_path / "kept", good, bad, options=("--trust",))
    assert status == 1, said
    assert "the departure comes from: deepspeed.fp16.enabled: false -> true\n" in said
    assert "2 settings differ" in said  # where it is recorded is the trials' affair
    assert "     train.lr: 0.002 -> 1\n" in said  # nothing follows from it here


def test_ctrl_c(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = _run_folder(tmp_path / "good"), _run_folder(tmp_path / "bad", "train.precision=fp16")
    Ranks.status = INTERRUPTED
    status, said = _bisect(capsys, tmp_path / "kept", good, bad)
    assert status == 130
    assert f"the same command with -o {tmp_path / 'kept'} goes on from here" in said
    Ranks.status = 0
    assert _bisect(capsys, tmp_path / "kept", good, bad)[0] == 1
    assert len(Ranks.runs) == 3  # the one that was interrupted, GOOD, BAD


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = _run_folder(tmp_path / "good")
    files = {
        "template": "defaults: [a]\n",
        "list": "[1]\n",
        "broken": "a: [1\n",
        "key": (good / "config.yaml").read_text() + "surplus: 1\n",
        "short": "cluster: {}\n",
        "resumed": (good / "config.yaml")
        .read_text()
        .replace("resume: null", f"resume: {tmp_path / 'resumed'}"),
    }
    for name, text in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    (tmp_path / "ds.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for other, options, sentence in (
        ("template", (), "is no complete launch configuration"),
        ("list", (), "is no complete launch configuration"),
        ("broken", (), "cannot be read: "),
        ("key", (), "surplus is 1: extra inputs are not permitted"),
        ("short", (), "the key 'cluster.name' is missing"),
        ("resumed", (), "this run was continued in its own folder"),
        ("empty", (), "config.yaml does not exist: pass run folders of xtrain launch"),
        ("nothing", (), "nothing does not exist"),
        ("ds.json", (), "are of two kinds"),
        ("good", (), "have the same settings"),
        (
            "good",
            ("--", "x", "{config}"),
            f"`-- COMMAND` is for DeepSpeed configs, such as {good / 'ds_config.json'}",
        ),
    ):
        status, said = _bisect(capsys, tmp_path / "kept", good, tmp_path / other, options=options)
        assert status == 2, said
        assert sentence in said
        assert len(said.splitlines()) == 1
    assert cli.main(["align", "--bisect", str(tmp_path / "ds.json"), str(tmp_path / "ds.json")]) == 2
    assert "how is" in capsys.readouterr().err
    assert not Ranks.runs


@pytest.mark.slow
def test_precision_among_harmless_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real runs, of two ranks each."""
    (tmp_path / "text").mkdir()
    common = [
        "model.num_layers=1", "model.hidden_size=32", "model.ffn_size=32", "model.vocab_size=300",
        "train.seq_length=32", "train.micro_batch_size=4", "train.global_batch_size=8", "train.warmup_steps=2",
        f"train.steps={STEPS}", f"data.path={write_corpus(tmp_path / 'text', 200)}",
    ]  # fmt: skip
    harmless = ["parallel=zero2", "+deepspeed.zero_optimization.reduce_bucket_size=1000", "backend=fake"]
    harmless += [
        "+deepspeed.zero_optimization.overlap_comm=true",
        "train.log_interval=1",
        "+cluster.env.SOME=1",
    ]
    good, bad = tmp_path / "good", tmp_path / "bad"
    assert cli.main(["launch", *common, f"run_dir={good}"]) == 0
    assert cli.main(["launch", *common, *harmless, "train.precision=bf16", f"run_dir={bad}"]) == 0
    status, said = _bisect(capsys, tmp_path / "kept", good, bad, options=("--policy", "relative:1e-5"))
    assert status == 1, said
    assert "the departure comes from: train.precision: fp32 -> bf16 (with deepspeed.bf16.enabled)\n" in said
    assert "without it BAD agrees with GOOD" in said
    assert "not known" not in said
