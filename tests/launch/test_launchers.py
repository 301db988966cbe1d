"""What is handed to ssh, srun, sbatch, mpiexec, bsub and kubectl: words and files, nothing is run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from xtrain import cli
from xtrain.base.errors import ConfigError
from xtrain.launch.compose import compose_config
from xtrain.launch.job import Job, make_job
from xtrain.launch.launchers import kubernetes, mpi, slurm, sunway
from xtrain.launch.launchers.agents import agent_command, explain_silence
from xtrain.launch.nodes import Node, place


def job(*overrides: str) -> Job:
    """Of a run that is not started."""
    config, _ = compose_config(["run_dir=/x/My_run", *overrides])
    return make_job(config, [])


# Fields of TrainJob that are used, as the CustomResourceDefinition of kubeflow/trainer declares them (manifests of
# 2026-08-21, trainjobs.trainer.kubeflow.org, version v1alpha1). `*` is a list's item.
TRAIN_JOB: dict[str, type] = {
    "spec.runtimeRef.name": str,
    "spec.trainer.image": str,
    "spec.trainer.command.*": str,
    "spec.trainer.numNodes": int,
    "spec.trainer.numProcPerNode": int,
    "spec.trainer.env.*.name": str,
    "spec.trainer.env.*.value": str,
    "spec.trainer.resourcesPerNode.limits": dict,
    "spec.trainer.resourcesPerNode.requests": dict,
    "spec.runtimePatches.*.manager": str,
}
_POD = "spec.runtimePatches.*.trainingRuntimeSpec.template.spec.replicatedJobs.*.template.spec.template.spec"
TRAIN_JOB |= {
    f"{_POD.removesuffix('.template.spec.template.spec')}.name": str,
    f"{_POD}.volumes.*.name": str,
    f"{_POD}.volumes.*.persistentVolumeClaim.claimName": str,
    f"{_POD}.containers.*.name": str,
    f"{_POD}.containers.*.volumeMounts.*.name": str,
    f"{_POD}.containers.*.volumeMounts.*.mountPath": str,
}
CLUSTER = ["cluster=kubernetes", "cluster.nodes=2", "train.global_batch_size=32"]
KUBERNETES = [*CLUSTER, "cluster.kubernetes.image=i", "cluster.kubernetes.claim=c"]


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if path in TRAIN_JOB:
        return [(path, value)]
    if isinstance(value, dict):
        return [leaf for key, child in value.items() for leaf in _leaves(child, f"{path}.{key}".lstrip("."))]
    if isinstance(value, list):
        return [leaf for child in value for leaf in _leaves(child, f"{path}.*")]
    return [(path, value)]


def test_the_train_job_has_fields_of_the_published_definition() -> None:
    one = job(*KUBERNETES, "+cluster.kubernetes.resources={nvidia.com/gpu: 2}", "+cluster.env.A=1")
    found = yaml.safe_load(kubernetes.manifest(one))
    assert (found["apiVersion"], found["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert found["metadata"] == {"name": "my-run", "namespace": "default"}
    leaves = _leaves({"spec": found["spec"]})
    assert {path for path, _ in leaves} == set(TRAIN_JOB)
    for path, value in leaves:
        assert isinstance(value, TRAIN_JOB[path]), path
    trainer = found["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 2)
    assert len(trainer["command"]) <= 128
    assert trainer["command"][:2] == ["torchrun", "--no-python"]
    assert "/runs/My_run/checkpoint" in trainer["command"]
    assert not any("/x/My_run" in word for word in trainer["command"])
    assert {"name": "XTRAIN_RUN_DIR", "value": "/runs/My_run"} in trainer["env"]
    assert {"name": "A", "value": "1"} in trainer["env"]


@pytest.mark.parametrize("lacking", ["image", "claim"])
def test_what_only_the_site_knows_has_to_be_said(
    lacking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [word for word in KUBERNETES if f".{lacking}=" not in word]
    assert cli.main(["launch", f"run_dir={tmp_path / 'run'}", *args]) == 2
    assert capsys.readouterr().err.startswith(f"xtrain: error: cluster.kubernetes.{lacking} is not set: ")


def test_the_manifest_is_written_and_how_to_start_it_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", f"run_dir={tmp_path / 'run'}", *KUBERNETES]) == 0
    assert f"kubectl apply -f {tmp_path / 'run' / 'trainjob.yaml'}" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "trainjob.yaml").read_text())["kind"] == "TrainJob"


def test_bsub() -> None:
    one = job(
        "cluster=sunway", "cluster.nodes=2", "train.global_batch_size=96", "cluster.sunway.queue=q_x",
        "cluster.sunway.share_size=7000", "cluster.sunway.cross_size=28000", "cluster.sunway.options=[-o,out]",
    )  # fmt: skip
    words = sunway.command(one, place(one.nodes), {"B": "2 3", "A": "1"})
    start = "bsub -I -b -q q_x -N 2 -cgsp 64 -mpecg 6 -share_size 7000 -cross_size 28000 -o out"
    assert shlex.join(words).startswith(f"{start} env A=1 'B=2 3' python3 -u ")
    assert "xtrain.launch.rank" in words
    for wrong, said in (
        (["cluster.sunway.queue=null"], "cluster.sunway.queue is not set"),
        (["cluster.ranks_per_node=4"], "cluster.ranks_per_node=4, but a rank is started on each of"),
    ):
        one = job("cluster=sunway", "train.global_batch_size=96", "cluster.sunway.queue=q", *wrong)
        with pytest.raises(ConfigError, match=said):
            sunway.command(one, place(one.nodes), {})


@pytest.mark.parametrize(
    ("said", "kind"),
    [("HYDRA build details:\n  Version: 4.2", "mpich"), ("mpirun (Open MPI) 4.1.4", "openmpi"),
     ("Intel(R) MPI Library for Linux* OS, Version 2021.9\nHYDRA", "intel")],
)  # fmt: skip
def test_mpiexec_says_of_which_mpi_it_is(said: str, kind: str, tmp_path: Path) -> None:
    command = tmp_path / "mpiexec"
    command.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n")
    command.chmod(0o755)
    assert mpi.flavour(str(command)) == kind


def test_an_unknown_mpiexec(tmp_path: Path) -> None:
    command = tmp_path / "mpiexec"
    command.write_text("#!/bin/sh\necho hello\n")
    command.chmod(0o755)
    with pytest.raises(ConfigError, match=r"set cluster\.mpi\.flavour"):
        mpi.flavour(str(command))
    with pytest.raises(ConfigError, match="there is no no-mpiexec on this machine"):
        mpi.program("no-mpiexec")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mpich", "-n 4 -ppn 2 -hosts a,b -genv A 1 -genv MASTER_ADDR a -genv MASTER_PORT 29501 --extra"),
        ("intel", "-n 4 -ppn 2 -hosts a,b -genv A 1 -genv MASTER_ADDR a -genv MASTER_PORT 29501 --extra"),
        ("openmpi", "-n 4 --host a:2,b:2 -x A=1 -x MASTER_ADDR=a -x MASTER_PORT=29501 --extra"),
    ],
)
def test_words_of_mpiexec(kind: str, words: str) -> None:
    one = job(
        "cluster=mpi", "cluster.hosts=[a,b]", "train.global_batch_size=32", "cluster.master_port=29501",
        "cluster.mpi.command=cat", f"cluster.mpi.flavour={kind}", "cluster.mpi.args=[--extra]",
    )  # fmt: skip
    found = mpi.command(one, place(one.nodes), {"A": "1"})
    assert shlex.join(found[1:]).startswith(f"{words} {sys.executable} -u ")


def test_nodes_that_mpiexec_cannot_place() -> None:
    common = ["cluster=mpi", "cluster.mpi.command=cat", "train.global_batch_size=48"]
    uneven = job(*common, "cluster.hosts=['a slots=2','b slots=1']", "cluster.mpi.flavour=mpich")
    with pytest.raises(
        ConfigError, match="nodes with different numbers of slots need Open MPI, or cluster=hosts"
    ):
        mpi.command(uneven, place(uneven.nodes), {})
    chosen = job(
        *common, "cluster.hosts=['a slots=4']", "cluster.include='a:1,2,3'", "cluster.mpi.flavour=openmpi"
    )
    with pytest.raises(ConfigError, match="include and exclude of single slots need agents"):
        mpi.command(chosen, place(chosen.nodes), {})


def test_the_batch_script(tmp_path: Path) -> None:
    one = job(
        "cluster=slurm", "cluster.nodes=2", "train.global_batch_size=32", "cluster.slurm.time=1-00:00:00",
        "cluster.slurm.account=me", "+cluster.slurm.options.gpus_per_node=8", "+cluster.slurm.options.exclusive=true",
        "+cluster.slurm.options.requeue=false", "cluster.slurm.setup=[module load x]", "run_dir='/x/a b'",
    )  # fmt: skip
    command = slurm.launch_command(["model=glm_335m", "run_dir=y"], ["--seed=1"], one, None)
    assert command[-5:] == ["run_dir=/x/a b", "model=glm_335m", "resume=auto", "--", "--seed=1"]
    script = slurm.batch_script(one, command)
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in (
        "--nodes=2", "--ntasks-per-node=1", "--no-kill", "--signal=B:USR1@180", "--time=1-00:00:00", "--account=me",
        "--gpus-per-node=8", "--exclusive", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in lines
    assert "#SBATCH --requeue" not in lines
    assert lines.index("module load x") < lines.index(f"cd {shlex.quote(os.getcwd())}")
    assert lines[-1].startswith(f"exec {sys.executable} ")
    assert shlex.split(lines[-1])[1:] == command
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_machine_without_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert cli.main(["launch", f"run_dir={tmp_path / 'run'}", "cluster=slurm"]) == 2
    assert "there is no sbatch on this machine: submit from a login node" in capsys.readouterr().err


def test_how_agents_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/my path")
    hosts = job("cluster=hosts", "cluster.hosts=[a,localhost]", "train.global_batch_size=32",
                "cluster.ssh.args=[-p,'2222']", "cluster.python=/y/python")  # fmt: skip
    words = agent_command(hosts.cluster, hosts.nodes[0])
    assert words[:7] == ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-p"]
    assert words[7:9] == ["2222", "a"]
    assert words[9].startswith(f"cd {shlex.quote(os.getcwd())} && exec env 'PYTHONPATH=/my path' /y/python ")
    assert agent_command(hosts.cluster, hosts.nodes[1])[0] == "/y/python"  # this machine: no ssh
    one = job("cluster=slurm", "cluster.slurm.srun_args=['--gres=gpu:8']")
    words = agent_command(one.cluster, Node("n7", 8))
    assert words[0] == "srun"
    assert {"--nodelist=n7", "--overlap", "--gres=gpu:8"} < set(words)
    assert words.index("--gres=gpu:8") < words.index(sys.executable)


@pytest.mark.parametrize(
    ("printed", "code", "said"),
    [
        (
            "ssh: Could not resolve hostname b: Name or service not known",
            255,
            "there is no host of this name",
        ),
        ("ssh: connect to host b port 22: Connection refused", 255, "it refuses ssh"),
        ("root@b: Permission denied (publickey).", 255, "ssh is not let in without a password"),
        ("Host key verification failed.", 255, "its host key is not known or has changed"),
        ("ssh: connect to host b port 22: No route to host", 255, "it cannot be reached"),
        ("/usr/bin/python3: No module named xtrain", 1, "its Python has no xtrain"),
        (
            "env: '/no/python': No such file or directory",
            127,
            "the Python or the working folder is not there",
        ),
        ("ValueError: something", 1, "no agent could be started: ValueError: something"),
    ],
)
def test_why_a_node_does_not_answer(printed: str, code: int, said: str) -> None:
    sentence = explain_silence(Node("b", 1), ["a greeting", printed], code)
    assert sentence.startswith(f"node b: {said}")
    assert printed in sentence
    assert (
        explain_silence(Node("b", 1), [], None) == "node b: no agent could be started: no answer came in time"
    )
