"""docs/ci/align.yml as it stands, and real launches on backend "fake", judged by the same reference and envelope.

The job runs as GitHub's runner would run it: in a clone of what the commented commands have added, each step in a shell
of its own. Installing is left out: the environment of the tests has it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.parity.corpus import write_corpus
from xtrain.align.envelope import read_envelope
from xtrain.align.record import read_record

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "docs" / "ci" / "align.yml"
OTHER_PROCESSOR = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
"""Kernels of torch, MKL and oneDNN as on a processor without AVX: they round differently."""
TRAIN = [
    "model=glm_tiny", "train.steps=50", "data.path=ci/text.txt", "+deepspeed.xtrain.record.modules_every=10",
    "cluster.max_restarts=0",
]  # fmt: skip
STEP, HIT = 21, "layers.1.mlp.dense_in"


def _environment(**more: str) -> dict[str, str]:
    """`xtrain` is found on the path, and is the one of this checkout."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("XTRAIN_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**env, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "400", **more}


def _shell(script: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """As a step without `shell:` is run on Linux."""
    return subprocess.run(
        ["bash", "-e", "-c", script], cwd=folder, env=_environment(**more), capture_output=True, text=True
    )


def _jobs() -> dict[str, Any]:
    jobs: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    return jobs


def _preparation() -> str:
    """The commands of the comment."""
    return "\n".join(re.findall(r"^#   (.+)$", WORKFLOW.read_text(), re.MULTILINE))


@dataclass
class Outcome:
    """What a job has left: `failed` are the names of the steps that did."""

    folder: Path
    failed: list[str] = field(default_factory=list)
    output: str = ""

    @property
    def summary(self) -> str:
        path = self.folder / "summary"
        return path.read_text() if path.exists() else ""


def _run_job(checkout: Path, folder: Path, **more: str) -> Outcome:
    subprocess.run(["git", "clone", "-q", str(checkout), str(folder)], check=True)
    outcome = Outcome(folder)
    job = _jobs()["align"]
    for step in job["steps"]:
        if "uses" in step or step["name"] == "Install":
            continue
        condition = step.get("if", "success()")
        assert condition in ("success()", "always()"), condition
        if outcome.failed and condition == "success()":
            continue
        env = {**job["env"], **step.get("env", {}), "GITHUB_STEP_SUMMARY": str(folder / "summary"), **more}
        done = _shell(step["run"], folder, **env)
        outcome.output += done.stdout + done.stderr
        if done.returncode:
            outcome.failed.append(step["name"])
    return outcome


def test_the_workflow_has_githubs_form() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    # YAML 1.1 reads the key `on` as true; GitHub does not.
    assert set(workflow) == {"name", True, "permissions", "jobs"}
    assert set(workflow[True]) <= {"pull_request", "push", "schedule", "workflow_dispatch"}
    (job,) = workflow["jobs"].values()
    assert set(job) == {"runs-on", "timeout-minutes", "env", "steps"}
    assert all(isinstance(value, str) for value in job["env"].values())
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        assert set(step) <= {"name", "uses", "with", "run", "if", "env"}
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/x@v1"))
    # The reference is made by the command that is run.
    train = next(step["run"] for step in job["steps"] if step.get("name") == "Train")
    lines = _preparation().splitlines()
    assert lines[0].replace("run_dir=ci/reference", "run_dir=candidate") == train
    assert lines[1].partition(" -- ")[2].replace("run_dir={run}", "run_dir=candidate") == train


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which the commented commands were run."""
    folder = tmp_path_factory.mktemp("user") / "repository"
    (folder / "ci").mkdir(parents=True)
    write_corpus(folder / "ci", 400).rename(folder / "ci" / "text.txt")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    done = _shell(_preparation(), folder, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *who, "commit", "-q", "-m", "reference"], cwd=folder, check=True)
    return folder


@pytest.mark.slow
def test_the_reference_and_its_envelope(checkout: Path) -> None:
    envelope = read_envelope(checkout / "ci" / "reference" / "envelope.npz")
    assert envelope.header["world_size"] == 2
    assert envelope.leave_one_out() == 0
    assert envelope.bands is not None
    assert envelope.norms is not None
    assert all(limit.max() < 1e-2 for limit in envelope.limit.values())


@pytest.mark.slow
def test_the_job_passes_on_another_processor(checkout: Path, tmp_path: Path) -> None:
    outcome = _run_job(checkout, tmp_path / "clone", **OTHER_PROCESSOR)
    assert not outcome.failed, outcome.output
    assert outcome.summary.startswith("# Loss curves: aligned")
    header = read_record(outcome.folder / "candidate").headers[0]
    assert header["environment"]["capability"] == "DEFAULT"
    suite = ElementTree.parse(outcome.folder / "alignment.xml").getroot()
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("3", "0")  # losses, norms, modules
    assert "</html>" in (outcome.folder / "alignment.html").read_text()
    (upload,) = [step for step in _jobs()["align"]["steps"] if "upload" in step.get("uses", "")]
    for path in upload["with"]["path"].split():
        assert (outcome.folder / path).exists(), path


@pytest.mark.slow
def test_the_job_fails_with_a_report(checkout: Path, tmp_path: Path) -> None:
    """Initial weights one percent off: a defect that no single value betrays."""
    outcome = _run_job(checkout, tmp_path / "clone", XTRAIN_PERTURB="1:0.01")
    assert outcome.failed == ["Compare with the reference"], outcome.output
    assert outcome.summary.startswith("# Loss curves: not aligned")
    assert "in phase forward of step 1:" in outcome.summary
    suite = ElementTree.parse(outcome.folder / "alignment.xml").getroot()
    assert suite.attrib["failures"] == "3"


@pytest.mark.slow
def test_the_job_fails_where_training_does(checkout: Path, tmp_path: Path) -> None:
    outcome = _run_job(checkout, tmp_path / "clone", XTRAIN_PERTURB="nonsense")
    assert outcome.failed == ["Train"], outcome.output
    assert "XTRAIN_PERTURB=nonsense is neither" in outcome.output
    assert outcome.summary == ""


# ---------------------------------------------------------------- the fake backend, launched


def _launch(checkout: Path, run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = ["xtrain", "launch", *TRAIN, f"run_dir={run_dir}", *more]
    return subprocess.run(words, cwd=checkout, env=_environment(), capture_output=True, text=True)


def _align(checkout: Path, run_dir: Path) -> subprocess.CompletedProcess[str]:
    words = ["xtrain", "align", "ci/reference", str(run_dir), "--policy", "envelope"]
    return subprocess.run(words, cwd=checkout, env=_environment(), capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["backend=fake_sw26010pro"],
        ["backend=fake_dcu_nobf16", "parallel=zero3"],
        ["cluster.ranks_per_node=1", "parallel=zero2"],
    ],
    ids=" ".join,
)
def test_launches_that_only_round_differently(checkout: Path, tmp_path: Path, settings: list[str]) -> None:
    done = _launch(checkout, tmp_path / "run", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = _align(checkout, tmp_path / "run")
    assert verdict.returncode == 0, verdict.stdout
    assert "aligned: the curves agree" in verdict.stdout
    assert "no module departs" in verdict.stdout


def _fault(**values: Any) -> list[str]:
    text = ",".join(f"{key}:{value}" for key, value in {"rank": 1, **values}.items())
    return ["backend=fake", f"+backend.fake.faults=[{{{text}}}]"]


@pytest.mark.slow
def test_a_launch_with_a_flipped_bit(checkout: Path, tmp_path: Path) -> None:
    flip = {"kind": "bit_flip", "target": "gradient", "name": f"{HIT}.weight", "bit": 30, "element": 77}
    done = _launch(checkout, tmp_path / "run", *_fault(**flip, step=STEP))
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = _align(checkout, tmp_path / "run")
    assert verdict.returncode == 1
    assert f"not aligned: the curves part at step {STEP + 1}:" in verdict.stdout
    assert f"the first module that departs is {HIT}, in phase gradient of step {STEP}:" in verdict.stdout


@pytest.mark.slow
def test_a_launch_with_a_killed_rank(checkout: Path, tmp_path: Path) -> None:
    done = _launch(checkout, tmp_path / "run", *_fault(kind="killed_rank", step=4))
    assert done.returncode == 1
    assert "rank 1 was killed by SIGKILL" in done.stdout + done.stderr
    assert "3 steps" in _align(checkout, tmp_path / "run").stdout
