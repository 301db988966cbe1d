"""What can be wrong with the nodes of a run, found before anything is started there."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from xtrain.base.errors import ConfigError
from xtrain.launch.environment import exported
from xtrain.launch.job import Job
from xtrain.launch.nodes import Layout
from xtrain.launch.survey import digest
from xtrain.version import __version__

Hello = dict[str, Any]


def what_is_wrong(job: Job, hellos: dict[str, Hello]) -> dict[str, str]:
    """One sentence for each node that does not fit the others, by its name."""
    torch = metadata.version("torch")
    script = digest(str(job.script))
    found = {}
    for node in job.nodes:
        hello = hellos.get(node.name)
        if hello is None:
            continue
        wrong = _versions(hello, torch) or _files(job, hello, script) or _devices(job, node.slots, hello)
        if wrong:
            found[node.name] = f"node {node.name}: {wrong}"
    return found | _memory(job, {name: hello for name, hello in hellos.items() if name not in found})


def _versions(hello: Hello, torch: str) -> str | None:
    here = {"xtrain": __version__, "torch": torch, "python": ".".join(platform.python_version_tuple()[:2])}
    there = {**hello, "python": ".".join(hello["python"].split(".")[:2])}
    for name, version in here.items():
        if there[name] != version:
            return f"{name} {there[name] or 'is not installed'} there, {version} here: install the same on every node"
    return None


def _files(job: Job, hello: Hello, script: str | None) -> str | None:
    if job.cluster.shared and not hello["shared"]:
        return (
            f"the run folder {job.run_dir} is not there: put it on a file system that all nodes see, or say "
            "cluster.shared=false to have it collected from the nodes' own disks"
        )
    found = hello["files"].get(str(job.script))
    if found is None:
        return f"the script {job.script} is not there: put it on a file system that all nodes see, or copy it"
    if found != script:
        return f"the script {job.script} has another content than here: copy it again"
    return None


def _devices(job: Job, slots: int, hello: Hello) -> str | None:
    if hello["devices"] is not None and hello["devices"] < slots:
        return f"it has {hello['devices']} devices of backend {job.backend}, and is to have {slots} ranks"
    return None


def _memory(job: Job, hellos: dict[str, Hello]) -> dict[str, str]:
    """Nodes with too little memory for the model's states, which is the least that a rank needs."""
    if job.needs is None:
        return {}
    device, found = job.cluster.device, {}
    if device is not None and device.memory_gb is not None and job.needs > device.memory_gb * 1e9:
        why = f"a rank needs {_gb(job.needs)} for the model's states, and {device.name} has {device.memory_gb:g} GB"
        return {name: f"node {name}: {why}: take more ranks, or a higher ZeRO stage" for name in hellos}
    if job.backend not in (None, "cpu", "fake", "sunway"):
        return {}
    machines: dict[str, int] = {}
    for node in job.nodes:
        if (hello := hellos.get(node.name)) is None:
            continue
        machines[hello["machine"]] = machines.get(hello["machine"], 0) + node.slots * job.needs
        if hello["memory"] is not None and machines[hello["machine"]] > hello["memory"]:
            found[node.name] = (
                f"node {node.name}: {node.slots} ranks need {_gb(node.slots * job.needs)} for the model's states, and "
                f"{_gb(hello['memory'])} are free: take more nodes, a higher ZeRO stage or a smaller model"
            )
    return found


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def address_of_first(job: Job, layout: Layout, hellos: dict[str, Hello]) -> str:
    """Where the ranks meet: on loopback when they are all on one node, else at the first node's address.

    Raises:
        ConfigError: that cannot be told, or gloo is told to listen elsewhere.
    """
    names = [node.name for node in layout.nodes]
    if len(names) == 1:
        return "127.0.0.1"
    first, address = hellos[names[0]], _address(names, hellos, job.cluster.interface)
    gloo = {**exported(), **job.env}.get("GLOO_SOCKET_IFNAME", "")
    if not address.startswith("127.") and first["interfaces"].get(gloo, "").startswith("127."):
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME={gloo} in the environment is the loopback interface, where ranks on {len(names)} "
            "nodes cannot meet: unset it, or set it to the interface of the cluster's network"
        )
    return address


def _address(names: list[str], hellos: dict[str, Hello], wanted: str | None) -> str:
    first = hellos[names[0]]
    if wanted is not None:
        if wanted not in first["interfaces"]:
            raise ConfigError(
                f"node {names[0]}: there is no network interface {wanted} with an address: it has "
                f"{', '.join(sorted(first['interfaces']))}"
            )
        return str(first["interfaces"][wanted])
    if first["address"] is not None:
        return str(first["address"])
    if len({hellos[name]["machine"] for name in names}) == 1:
        return "127.0.0.1"
    raise ConfigError(
        f"node {names[0]}: its address for the other nodes cannot be told: name their network with cluster.interface"
    )
