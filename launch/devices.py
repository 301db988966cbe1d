"""How many devices this machine has, without importing torch, which takes seconds.

The chips in the table are counted by their drivers' files and tools; any other backend is asked, in a process of its
own.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from xtrain.base.errors import BackendError
from xtrain.launch.deepspeed.binding import numa_nodes


@dataclass(frozen=True)
class Devices:
    """What a launcher has to know of a machine's devices.

    Attributes:
        backend: the name of the backend that ranks will take.
        count: devices, whatever the variables hide; None: host processors, on which any number of ranks can run.
        variables: environment variables that limit the devices a process sees.
    """

    backend: str
    count: int | None
    variables: tuple[str, ...] = ()


def _numbered(name: str) -> int:
    """Device files of that name with a number."""
    return len([path for path in Path("/dev").glob(f"{name}*") if re.fullmatch(rf"{name}\d+", path.name)])


def _nvidia() -> int:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return _numbered("nvidia")
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _kfd() -> int:
    """GPUs among the nodes of AMD's and Hygon's driver; processors are nodes, too, with gpu_id 0."""
    ids = Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
    return sum(path.read_text().strip() not in ("", "0") for path in ids)


def _davinci() -> int:
    return _numbered("davinci")


def _torch_build() -> str:
    """What is behind the + in torch's version: cpu, cu126, rocm6.4, ..."""
    try:
        return metadata.version("torch").partition("+")[2]
    except metadata.PackageNotFoundError:
        return "cpu"


def _is_hip(build: str) -> bool:
    return build.startswith(("rocm", "hip", "das", "dtk"))


@dataclass(frozen=True)
class _Chip:
    variable: str
    count: Callable[[], int]
    fits: Callable[[], bool]
    """Whether the installed torch is for it: a machine with GPUs may have a torch for host processors."""


_CHIPS = {
    "cuda": _Chip(
        "CUDA_VISIBLE_DEVICES", _nvidia, lambda: _torch_build() != "cpu" and not _is_hip(_torch_build())
    ),
    "dcu": _Chip("HIP_VISIBLE_DEVICES", _kfd, lambda: _torch_build() != "cpu"),
    "ascend": _Chip("ASCEND_RT_VISIBLE_DEVICES", _davinci, lambda: find_spec("torch_npu") is not None),
}
VARIABLES = {name: chip.variable for name, chip in _CHIPS.items()}
"""By backend: the environment variable that limits the devices a process sees."""
_HOST = ("cpu", "fake", "sunway")
_DEEPSPEEDS = {"npu": ("ascend",), "cuda": ("cuda", "dcu")}
"""Values of DS_ACCELERATOR that are called otherwise here, or mean one of several."""


def shown_by_system(backend: str | None) -> int | None:
    """Devices of a backend that the system's files show, without a program or library of the vendor; None: none are."""
    counts = {"cuda": lambda: _numbered("nvidia"), "dcu": _kfd, "ascend": _davinci}
    return (counts[backend]() or None) if backend in counts else None


def find(environ: Mapping[str, str] | None = None) -> Devices:
    """The devices of this machine that ranks with this environment would use.

    Raises:
        BackendError: the environment names a backend that has no device here, or that cannot be used.
    """
    environ = os.environ if environ is None else environ
    chosen, variable = environ.get("XTRAIN_BACKEND"), "XTRAIN_BACKEND"
    candidates: tuple[str, ...] = (chosen,) if chosen else ()
    if not chosen and (accelerator := environ.get("DS_ACCELERATOR")):
        candidates, variable = _DEEPSPEEDS.get(accelerator, (accelerator,)), "DS_ACCELERATOR"
    if any(name not in _CHIPS and name not in _HOST for name in candidates):
        return _ask(environ)
    if not candidates and metadata.entry_points(group="xtrain.backends"):
        return _ask(environ)  # an installed backend comes before xtrain's own
    for name in candidates or _CHIPS:
        if name in _HOST:
            return Devices(name, None)
        chip = _CHIPS[name]
        if (candidates or chip.fits()) and (count := chip.count()):
            return Devices(name, count, (chip.variable,))
    if candidates:
        raise BackendError(f"{variable}={environ[variable]}: no such device is found on this machine")
    return Devices("sunway" if platform.machine() == "sw_64" else "cpu", None)


_QUESTION = """
import json, sys
from xtrain.backends import detect
from xtrain.base.errors import BackendError
try:
    backend = detect()
except BackendError as error:
    sys.exit(str(error))
runtime = backend.runtime
print(json.dumps([backend.name, runtime.device_count(), list(runtime.visible_devices_variables)]))
"""


def _ask(environ: Mapping[str, str]) -> Devices:
    """What the backend itself says, which imports torch."""
    answer = subprocess.run(
        [sys.executable, "-c", _QUESTION], env=dict(environ), capture_output=True, text=True
    )
    if answer.returncode:
        last = answer.stderr.strip().splitlines()[-1:]
        raise BackendError(last[0] if last else "the backend cannot be asked for its devices")
    name, count, variables = json.loads(answer.stdout.splitlines()[-1])
    return Devices(name, count, tuple(variables))


def host_ranks(environ: Mapping[str, str] | None = None) -> int:
    """Ranks for a machine of host processors when nobody says how many: LOCAL_SIZE, else one a NUMA node.

    As DeepSpeed has it; but the NUMA nodes are the system's own list, and need no numactl.
    """
    given = (os.environ if environ is None else environ).get("LOCAL_SIZE", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, len({tuple(cores) for cores in numa_nodes().values() if cores}))
