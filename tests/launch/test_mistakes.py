"""Every mistake on the command line: one sentence, exit status 2, no rank started, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xtrain import cli


def _launch(capsys: pytest.CaptureFixture[str], tmp_path: Path, *args: str) -> tuple[int, str, str]:
    status = cli.main(["launch", f"run_dir={tmp_path / 'run'}", *args])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["model=glm_tin"], "unknown model 'glm_tin': did you mean 'glm_tiny'?"),
        (["cluster=frontier"], "unknown cluster 'frontier': choose one of ascend910, "),
        (["parallel=zero4"], "unknown parallel 'zero4': did you mean 'zero"),
        (["train.stepps=5"], "unknown key 'train.stepps': did you mean 'train.steps'?"),
        (["train.steps=many"], "train.steps is 'many'"),
        (["train.steps=0"], "train.steps is 0"),
        (["train.precision=fp8"], "'fp32', 'bf16' or 'fp16'"),
        (["cluster.ranks_per_node=0"], "cluster.ranks_per_node is 0"),
        (["cluster.ranks_per_node=3"], "train_batch_size (16) is not divisible by"),
        (["train.global_batch_size=15"], "make train_batch_size a multiple of 16"),
        (
            ["cluster.nodes=2"],
            "cluster.nodes=2 on one machine: choose cluster=hosts, slurm, mpi or kubernetes",
        ),
        (["data.path=/no/such/file"], "data path '/no/such/file' does not exist"),
        (["data.path=[/no/*.txt,/other]"], "data path '/no/*.txt' does not exist"),
        (["deepspeed_config=/no/config.json"], "config file /no/config.json does not exist"),
        (
            ["+deepspeed.zero_optimization.overlap=true"],
            "unknown key 'overlap' in section 'zero_optimization'",
        ),
        (["deepspeed.zero_optimization.stage=4"], "'zero_optimization.stage' is 4"),
        (["+deepspeed.autotuning.enabled=true"], "'autotuning' is not there yet"),
        (["script=/no/script.py"], "script=/no/script.py does not exist"),
        (["resume=/no/run"], "there is no complete checkpoint in this folder"),
        (["train.lr=${nothing}"], "Interpolation key 'nothing' not found"),
        (["word"], "'word' is not of the form key=value"),
        (["--config-dir", "/no/folder"], "--config-dir /no/folder is not a folder"),
    ],
)
def test_one_sentence_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, args: list[str], said: str
) -> None:
    status, out, err = _launch(capsys, tmp_path, *args)
    assert status == 2
    assert said in err
    assert err.startswith("xtrain: error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "run").exists()


def test_unreadable_json_and_empty_checkpoint_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"train_batch_size": 16,,}')
    status, _, err = _launch(capsys, tmp_path, f"deepspeed_config={bad}")
    assert (status, "line 1, column" in err) == (2, True)
    status, _, err = _launch(capsys, tmp_path, f"resume={tmp_path}")
    assert (status, "no complete checkpoint" in err) == (2, True)


@pytest.mark.parametrize(
    ("given", "ignored"),
    [("own", "model=glm_335m"), ("own", "train.seq_length=64"), ("own", "data.path=x"), ("json", "train.lr=0.1"),
     ("json", "parallel=zero0"), ("json", "backend=cpu"), ("json", "+deepspeed.dump_state=true"),
     ("own json", "train.weight_decay=0.5")],
)  # fmt: skip
def test_settings_that_would_be_ignored_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, given: str, ignored: str
) -> None:
    script, config = tmp_path / "s.py", tmp_path / "ds.json"
    script.write_text("deepspeed.add_config_arguments(parser)\n")
    config.write_text(json.dumps({"train_batch_size": 8}))
    args = [f"script={script}"] if "own" in given else []
    args += [f"deepspeed_config={config}"] if "json" in given else []
    status, _, err = _launch(capsys, tmp_path, *args, ignored, "--dry-run")
    assert status == 2
    assert ignored.partition("=")[0].lstrip("+") in err
    status, out, _ = _launch(capsys, tmp_path, f"deepspeed_config={config}", "train.steps=9", "--dry-run")
    assert (status, "--steps=9" in out) == (0, True)


def test_unquoted_values_are_said_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = _launch(capsys, tmp_path, "script=a=b.py")
    assert (status, "quote the value" in err) == (2, True)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(cli.XtrainError, match="glm_tin"):
        cli.main(["launch", "--debug", "model=glm_tin"])


def test_dry_run_prints_what_would_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = _launch(
        capsys, tmp_path, "train.steps=7", "model=glm_335m", "--dry-run", "--", "--seed=5"
    )
    assert status == 0
    assert "--steps=7" in out
    assert "--hidden-size=1024" in out
    assert "ranks:\n  localhost: ranks 0 to 1, devices 0,1\n" in out
    (ranks,) = [line for line in out.splitlines() if line.startswith("  python -u")]
    assert ranks.endswith("--seed=5")
    assert "-m xtrain.launch.agent\n" in out
    assert "OMP_NUM_THREADS=1" in out
    assert not (tmp_path / "run").exists()


def test_a_users_own_choices_and_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine" / "cluster").mkdir(parents=True)
    (tmp_path / "mine" / "cluster" / "big.yaml").write_text(
        "defaults: [local, _self_]\nname: big\nranks_per_node: 4\nstop_timeout: 5\nenv: {FOO: bar}\n"
    )
    script = tmp_path / "my.py"
    script.write_text("deepspeed.add_config_arguments(parser)\n")
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"train_batch_size": 8}))
    args = [
        "--config-dir",
        str(tmp_path / "mine"),
        "cluster=big",
        f"script={script}",
        f"deepspeed_config={config}",
    ]
    status, out, _ = _launch(capsys, tmp_path, *args, "--dry-run", "--", "--mine", "1")
    assert status == 0
    assert "FOO=bar" in out
    assert f"-m xtrain.launch.rank {script} --deepspeed --deepspeed_config" in out
    assert "--mine 1\n" in out
    assert "--hidden-size" not in out
