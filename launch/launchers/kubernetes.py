"""A TrainJob of Kubeflow Trainer (API trainer.kubeflow.org/v1alpha1) for `kubectl apply`. Never run by us.

The runtime starts torchrun on every node by PET_ variables; torchrun starts the ranks. Kubernetes restarts them, and
the built-in script continues from what the run folder holds.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from xtrain.base.errors import ConfigError
from xtrain.base.run_folder import CHECKPOINTS, RUN_DIR_VARIABLE
from xtrain.launch.builtin import BUILTIN
from xtrain.launch.job import Job

MANIFEST = "trainjob.yaml"


def train_job(job: Job) -> dict[str, Any]:
    """The TrainJob.

    Raises:
        ConfigError: image or claim are missing, which only the site knows.
    """
    settings = job.cluster.kubernetes
    if settings.image is None:
        raise ConfigError("cluster.kubernetes.image is not set: name an image with xtrain in it")
    if settings.claim is None:
        raise ConfigError(
            "cluster.kubernetes.claim is not set: name the volume claim that holds the run folder"
        )
    mount = f"{settings.mount.rstrip('/')}/{job.run_dir.name}"
    # The image has a Python and an xtrain of its own; a script of the user's has to be in it under the same path.
    script = BUILTIN if job.builtin else str(job.script)
    arguments = [word.replace(str(job.run_dir), mount) for word in job.script_args]
    continuing = ["--continue"] if job.builtin else []
    # torchrun's own rendezvous is static here: the runtime says which node is which.
    command = [
        "torchrun",
        "--no-python",
        "python",
        "-u",
        "-m",
        "xtrain.launch.rank",
        script,
        *arguments,
        *continuing,
    ]
    environment = {**job.env, RUN_DIR_VARIABLE: mount}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": _name(job.run_dir.name), "namespace": settings.namespace},
        "spec": {
            "runtimeRef": {"name": settings.runtime},
            "trainer": {
                "image": settings.image,
                "command": command,
                "numNodes": job.cluster.nodes,
                "numProcPerNode": job.cluster.ranks_per_node,
                "env": [{"name": key, "value": value} for key, value in sorted(environment.items())],
                **_resources(settings.resources),
            },
            "runtimePatches": [
                {"manager": "xtrain.launch/kubernetes", **_volume(settings.claim, settings.mount)}
            ],
        },
    }


def _volume(claim: str, mount: str) -> dict[str, Any]:
    """The run folder's volume, for the pods of every node."""
    pod = {
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}],
        "containers": [{"name": "node", "volumeMounts": [{"name": "runs", "mountPath": mount}]}],
    }
    job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {"trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}


def _resources(resources: dict[str, str | int]) -> dict[str, Any]:
    return {"resourcesPerNode": {"limits": resources, "requests": dict(resources)}} if resources else {}


def _name(text: str) -> str:
    """A name that Kubernetes takes (RFC 1035)."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (name if name[:1].isalpha() else f"run-{name}")[:50].rstrip("-")


def manifest(job: Job) -> str:
    """The TrainJob as YAML, with the checkpoint folder that it writes to as a comment."""
    text = yaml.safe_dump(train_job(job), sort_keys=False)
    return f"# checkpoints: {job.cluster.kubernetes.mount}/{job.run_dir.name}/{CHECKPOINTS}\n{text}"
