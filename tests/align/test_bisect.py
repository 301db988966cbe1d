"""`xtrain align --bisect` on stand-ins that write a record at once; and, slow, on real launches of glm_tiny."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.align.records import write
from xtrain import cli
from xtrain.align.trials import Commands, Trials

STAND_IN = """
import json, sys, os
config, run, log = json.load(open(sys.argv[1])), sys.argv[2], sys.argv[3]
assert run == os.environ["XTRAIN_RUN_DIR"]
with open(log, "a") as file:
    file.write(run + "\\n")
number = sum(1 for line in open(log))
get = config.get
if get("bf16", {}).get("enabled") and get("fp16", {}).get("enabled"):
    sys.exit("two precisions")
if get("train_batch_size", 4) != get("micro", 4) * get("gradient_accumulation_steps", 1):
    sys.exit("batch sizes do not multiply")
RULE
if get("silent"):
    sys.exit(0)
with open(run + "/metrics.jsonl", "w") as file:
    file.write(json.dumps({"type": "header", "version": 1}) + "\\n")
    for step in range(1, get("steps", 6) + 1):
        loss = 2.0 + (0.5 if departs and step >= 3 else 0.0)
        file.write(json.dumps({"type": "step", "step": step, "loss": loss, "loss_hex": loss.hex()}) + "\\n")
sys.exit(get("status"))
"""


class Stage:
    """A folder with a stand-in for a training script; `departs` is an expression over `get` and `number` of the run."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.log = folder / "runs.log"
        self.kept = folder

    def rule(self, departs: str) -> None:
        self.log.unlink(missing_ok=True)
        self.kept = Path(tempfile.mkdtemp(dir=self.folder))
        (self.folder / "train.py").write_text(STAND_IN.replace("RULE", f"departs = {departs}"))

    def bisect(self, good: Any, bad: Any, *options: str, command: list[str] | None = None) -> tuple[int, str]:
        """(exit status, all that was said)."""
        paths = []
        for name, config in (("good", good), ("bad", bad)):
            path = self.folder / f"{name}.json"
            path.write_text(json.dumps(config))
            paths.append(str(path))
        usual = [sys.executable, "-S", str(self.folder / "train.py"), "{config}", "{run}", str(self.log)]
        kept = ["-o", str(self.kept)]
        status = cli.main(["align", "--bisect", *paths, *kept, *options, "--", *(command or usual)])
        said = self.capsys.readouterr()
        return status, said.out + said.err

    def runs(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Stage:
    return Stage(tmp_path, capsys)


HARMLESS = {f"harmless{i}": i for i in range(8)}


def test_one_setting_among_many(stage: Stage) -> None:
    stage.rule('get("zero", {}).get("stage") == 3')
    bad = {**HARMLESS, "zero": {"stage": 3, "bucket": 5}}
    status, said = stage.bisect({"zero": {"stage": 1}}, bad, "--markdown", str(stage.folder / "r.md"))
    assert status == 1, said
    assert "the departure comes from: zero.stage: 1 -> 3\nfirst step outside: 3\n" in said
    assert "without it BAD agrees with GOOD" in said
    runs = stage.runs()
    assert runs <= 3 + 2 * 4 + 1  # GOOD twice, BAD, two a halving, BAD without it
    assert f"{runs - 1} trials, policy relative:0.02" in said
    page = (stage.folder / "r.md").read_text()
    assert "- the departure comes from: zero.stage: 1 -> 3" in page
    assert "| zero.bucket | (absent) | 5 |" in page
    assert "| 2 | BAD | departs at step 3 |" in page
    # Nothing is run again, whatever the policy; what was interrupted is.
    status, again = stage.bisect({"zero": {"stage": 1}}, bad, "--policy", "exact")
    assert (status, stage.runs()) == (1, runs)
    assert f"({runs - 1} of them from an earlier search)" in again
    interrupted = next(folder for folder in stage.kept.iterdir() if folder.is_dir())
    (interrupted / "outcome.json").unlink()
    (interrupted / "left").touch()
    assert stage.bisect({"zero": {"stage": 1}}, bad)[0] == 1
    assert stage.runs() == runs + 1
    assert not (interrupted / "left").exists()
    about = [json.loads((f / "outcome.json").read_text()) for f in stage.kept.glob("*/")]
    assert ["zero.stage: 1 -> 3"] in [outcome["settings"] for outcome in about]


def test_settings_that_only_act_together(stage: Stage) -> None:
    stage.rule('get("a") == 2 and "gone" not in config')
    status, said = stage.bisect({"a": 1, "gone": [1], **HARMLESS}, {"a": 2, **HARMLESS, "more": 1})
    assert status == 1
    assert "the departure comes from these together: a: 1 -> 2, and gone: [1] -> (absent)\n" in said
    assert "without them BAD agrees with GOOD" in said


def test_causes_that_act_alone(stage: Stage) -> None:
    stage.rule('get("a") == 2 or get("harmless5") == 5')
    status, said = stage.bisect({"a": 1}, {"a": 2, **HARMLESS})
    assert status == 1
    assert "the departure comes from: a: 1 -> 2\n" in said
    assert "and, on its own, from: harmless5: (absent) -> 5\n" in said
    assert "without them BAD agrees with GOOD" in said
    status, said = stage.bisect({"a": 1, "harmless5": 0}, {"a": 2, "harmless5": 5})
    assert "without" not in said.splitlines()[-2]  # nothing else differs


def test_mixtures_that_cannot_run(stage: Stage) -> None:
    stage.rule('get("bf16", {}).get("enabled", False)')
    good = {"fp16": {"enabled": True}, "bf16": {"enabled": False}, "a": 1}
    bad = {"fp16": {"enabled": False}, "bf16": {"enabled": True}, "a": 2, "b": 3}
    status, said = stage.bisect(good, bad)
    assert status == 1
    assert "not known: it ended with status 1" in said
    assert "two precisions" in said
    assert "from these together: fp16.enabled: true -> false, and bf16.enabled: false -> true\n" in said
    assert "fewer of them may be enough, as not every smaller set could be judged: trial 5" in said
    stage.rule('get("train_batch_size") == 8')
    status, said = stage.bisect(
        {"micro": 2, "train_batch_size": 4, "gradient_accumulation_steps": 2, **HARMLESS},
        {"micro": 2, "train_batch_size": 8, "gradient_accumulation_steps": 4, "more": 1},
    )
    assert "train_batch_size: 4 -> 8, and gradient_accumulation_steps: 2 -> 4\n" in said


def test_a_run_that_departs_and_then_fails_has_departed(stage: Stage) -> None:
    stage.rule('get("a") == 2')
    status, said = stage.bisect({"a": 1}, {"a": 2, "status": 1, "steps": 4})
    assert status == 1
    assert "the departure comes from: a: 1 -> 2" in said


def test_curves_that_agree(stage: Stage) -> None:
    stage.rule("False")
    status, said = stage.bisect({"a": 1}, {"a": 2, "steps": 5})
    assert status == 0
    assert "the curves agree: there is no departure to explain" in said
    assert stage.runs() == 3


def test_what_cannot_be_searched(stage: Stage) -> None:
    good, bad = {"a": 1}, {"a": 2}
    stage.rule("number % 2")
    status, said = stage.bisect(good, bad)
    assert status == 2
    assert "GOOD does not agree with itself when it is run again (relative:0.02, step 3)" in said
    stage.rule("False")
    for configs, options, command, sentence in (
        ((good, {"a": 2, "status": 3}), [], None, "BAD ("),
        ((good, {"a": 2, "status": 3}), [], None, "cannot be run: it ended with status 3 ("),
        (({"a": 1, "status": 3}, bad), [], None, "cannot be run: it ended with status 3 ("),
        (({"silent": 1}, bad), [], None, "wrote no record to"),
        ((good, {"silent": 1}), [], None, "wrote no record to"),
        (({"steps": 0}, bad), [], None, "its record has no step with a loss"),
        ((good, bad), [], ["/nowhere/x", "{config}"], "/nowhere/x cannot be run: No such file"),
        ((good, bad), [], ["x", "{run}"], "COMMAND has no {config} in it"),
        ((good, good), [], None, "have the same settings: there is nothing to search"),
        (([1], bad), [], None, "must hold a JSON object"),
        ((good, bad), ["x"], None, "takes two configurations, GOOD and BAD, and was given 3"),
        ((good, bad), ["--markdown", "/nowhere/x"], None, "there is no folder /nowhere"),
        ((good, bad), ["--html", "x"], None, "--html has no meaning with --bisect"),
        ((good, bad), ["--plot", "x"], None, "--plot has no meaning with --bisect"),
        ((good, bad), ["--junit", "x"], None, "--junit has no meaning with --bisect"),
        ((good, bad), ["--loss", "x"], None, "--loss has no meaning with --bisect"),
        ((good, bad), ["--runs", "3"], None, "--runs has no meaning with --bisect"),
        ((good, bad), ["--perturbation", "0.1"], None, "--perturbation has no meaning with --bisect"),
        ((good, bad), ["--false-alarms", "0.1"], None, "--false-alarms has no meaning with --bisect"),
        (
            (good, bad),
            ["--envelope", "x.npz"],
            None,
            "is for --policy envelope, and the policy is relative:0.02",
        ),
        ((good, bad), ["--policy", "envelope"], None, "the envelope policy needs an envelope"),
        ((good, bad), ["--policy", "nearly"], None, "unknown policy 'nearly'"),
        ((good, bad), ["-o", "/dev/null/x"], None, "/dev/null/x cannot be written"),
    ):
        status, said = stage.bisect(*configs, *options, command=command)
        assert status == 2, said
        assert sentence in said


def test_one_search_a_folder(stage: Stage) -> None:
    stage.rule("False")
    with Trials(stage.kept, Commands([])).lock():
        status, said = stage.bisect({"a": 1}, {"a": 2})
    assert status == 2
    assert "is in use by another search" in said
    assert stage.bisect({"a": 1}, {"a": 2})[0] == 0


def test_the_envelope_as_the_judge(stage: Stage, tmp_path: Path) -> None:
    curves = [{step: 2.0 + 0.001 * ((seed * step) % 7) for step in range(1, 7)} for seed in range(1, 6)]
    paths = [str(write(tmp_path / f"{i}.jsonl", curve)) for i, curve in enumerate(curves)]
    envelope = str(tmp_path / "e.npz")
    assert cli.main(["align", "envelope", *paths, "-o", envelope]) == 0
    judged = ["--policy", "envelope", "--envelope", envelope]
    stage.rule('get("a") == 2')
    status, said = stage.bisect({"a": 1}, {"a": 2, **HARMLESS}, *judged)
    assert status == 1
    assert "the departure comes from: a: 1 -> 2" in said
    assert "1  agrees" in said
    stage.rule("True")
    status, said = stage.bisect({"b": 1}, {"b": 2}, *judged)
    assert status == 2
    assert "GOOD is outside the envelope (envelope, step 3), so no setting can be blamed" in said
    assert stage.runs() == 1
