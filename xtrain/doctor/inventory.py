"""What is here: versions, host, backends, process-group libraries. `python -m xtrain.doctor.inventory FILE [NAME]`.

Runs in a process of its own, because asking a driver may hang or die; writes each answer into FILE when it has it.
Backends named in XTRAIN_DOCTOR_SKIP did not answer an earlier process and are not asked.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from xtrain.doctor.event_log import EventLog
from xtrain.doctor.ranks import sentence

SKIP_VARIABLE = "XTRAIN_DOCTOR_SKIP"
DTYPES = ("float64", "float32", "bfloat16", "float16")
_PACKAGES = ("torch", "numpy", "mpi4py", "torch_npu", "deepspeed")


def versions() -> dict[str, str | None]:
    """Of Python, xtrain and the packages that matter; None for one that is not installed."""
    from xtrain.version import __version__

    found: dict[str, str | None] = {"python": platform.python_version(), "xtrain": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def host() -> dict[str, Any]:
    """The machine."""
    from xtrain.backends import host as memory

    return {
        "name": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processor": memory.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory.in_use()[1],
    }


def _dtypes(precision: Any) -> dict[str, str]:
    """For each dtype "native", "emulated in OTHER" or "absent"."""
    import torch

    native, stand_ins = precision.native_dtypes, precision.stand_ins
    answers = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        instead = stand_ins.get(dtype)
        other = f"emulated in {str(instead).removeprefix('torch.')}" if instead else "absent"
        answers[name] = "native" if dtype in native else other
    return answers


def _devices(runtime: Any) -> list[dict[str, Any]]:
    """The devices that this process sees; the memory is that of the first, which stands for all."""
    count = runtime.device_count()
    if not runtime.host_memory:
        runtime.set_device(0)
    memory = runtime.memory()
    return [
        {
            "index": None if count is None else index,
            "name": runtime.device_name(index),
            "memory_bytes": memory.total,
        }
        for index in range(1 if count is None else count)
    ]


def backend(name: str) -> dict[str, Any]:
    """Everything about one backend. Never raises: a backend that cannot answer says so in `reason`."""
    from xtrain.backends import registry
    from xtrain.comm import libraries

    entry: dict[str, Any] = {
        "name": name,
        "source": registry.source(name),
        "available": False,
        "reason": None,
    }
    entry |= {"library": None, "library_reason": None, "versions": {}, "devices": [], "dtypes": {}}
    try:
        entry["reason"] = registry.reason(name)
        if entry["reason"] is not None:
            return entry
        chip = registry.get(name)
        library = chip.collectives.process_group_backend
        entry |= {"library": library, "device_type": chip.runtime.device_type}
        entry["library_reason"] = (
            libraries.reason(library) if library in libraries.own() else chip.collectives.unavailable_reason()
        )
        entry["versions"] = chip.runtime.versions()
        entry["devices"] = _devices(chip.runtime)
        entry["dtypes"] = _dtypes(chip.precision)
        entry["available"] = True
    except Exception as error:  # third parties' code and vendors' drivers
        entry["reason"] = f"it does not answer as a backend should: {sentence(error)}"
    return entry


def library(name: str) -> dict[str, Any]:
    """Everything about one process-group library."""
    from xtrain.comm import libraries

    reason = libraries.reason(name)
    return {
        "name": name,
        "available": reason is None,
        "reason": reason,
        "version": None if reason else libraries.version(name),
        "device_types": libraries.devices(name),
        "started_by": libraries.started_by(name),
    }


def selected(asked: str | None) -> dict[str, Any]:
    """Which backend a script would get here, by whose word, or why none."""
    from xtrain.backends import registry
    from xtrain.base.errors import XtrainError

    variables = [name for name in ("XTRAIN_BACKEND", "DS_ACCELERATOR") if os.environ.get(name)]
    by = "--backend" if asked else variables[0] if variables else "detection"
    name = asked or (os.environ[variables[0]] if variables else None)
    try:
        return {"name": registry.detect(asked).name, "by": by, "reason": None}
    except XtrainError as error:
        return {"name": name, "by": by, "reason": str(error)}


def main(arguments: list[str]) -> int:
    """Write everything into the file."""
    from xtrain.launch.processes import die_with_parent

    die_with_parent()
    log = EventLog(Path(arguments[0]))
    log.write("versions", answer=versions())
    log.write("host", answer=host())
    from xtrain.backends import registry
    from xtrain.comm import libraries

    silent = os.environ.get(SKIP_VARIABLE, "").split(",")
    for name in registry.names():
        if name not in silent:
            with log.doing(f"backend {name}"):
                log.write("backend", answer=backend(name))
    for name in libraries.names():
        with log.doing(f"library {name}"):
            log.write("library", answer=library(name))
    with log.doing("the choice of a backend"):
        log.write("selected", answer=selected(arguments[1] if len(arguments) > 1 else None))
    log.write("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
