"""What ranks are given in their environment, beside what the settings say."""

from __future__ import annotations

import os
from typing import Any

from xtrain.launch.devices import VARIABLES
from xtrain.launch.job import Job
from xtrain.launch.nodes import Node
from xtrain.launch.schema import ClusterSection

_EXPORTED = (
    "XTRAIN_", "DS_", "DEEPSPEED_", "NCCL_", "GLOO_", "HCCL_", "RCCL_", "ASCEND_", "CUDA_", "HIP_", "ROCR_", "HSA_",
    "UCX_", "OMP_", "MKL_", "TORCH_", "PYTORCH_", "HF_", "TOKENIZERS_", "WANDB_",
)  # fmt: skip
"""Beginnings of variables that ranks on other nodes get from this one, as those of DeepSpeed's launcher do."""
_NOT_EXPORTED = ("XTRAIN_STORE", "XTRAIN_RUN_DIR", "XTRAIN_HEARTBEAT")


def exported() -> dict[str, str]:
    """Variables of this process that concern training."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_EXPORTED) and not name.startswith(_NOT_EXPORTED)
    }


def visible_devices(job: Job, node: Node, ranks: int) -> dict[str, str]:
    """The variables that show a node's ranks the devices which are theirs, where not all are."""
    if node.devices is None:
        return {}
    listed = ",".join(map(str, node.devices[:ranks]))
    # Without a backend nobody knows yet whose they are.
    wanted = (
        VARIABLES.values()
        if job.backend is None
        else [VARIABLES[job.backend]]
        if job.backend in VARIABLES
        else []
    )
    return dict.fromkeys(wanted, listed)


def interface(hello: dict[str, Any], address: str, cluster: ClusterSection) -> dict[str, str]:
    """Which network interface libraries take: loopback where all ranks are on one node, else the cluster's."""
    if cluster.interface is not None and not address.startswith("127."):
        return {f"{name}_SOCKET_IFNAME": cluster.interface for name in ("GLOO", "NCCL", "HCCL", "TP")}
    if address.startswith("127."):
        return {"GLOO_SOCKET_IFNAME": "lo"}
    found = hello.get("interface")
    return {"GLOO_SOCKET_IFNAME": found} if found else {}
