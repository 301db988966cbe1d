"""The variables that ranks on other machines get from here: by the beginning of their names, and from `.deepspeed_env`.

Ranks on this machine inherit the whole environment, and need none of this.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from xtrain.base.errors import ConfigError
from xtrain.base.log import logger

BEGINNINGS = ("MLFLOW", "PYTHON", "MV2", "UCX")
"""Whatever the chip, as in DeepSpeed."""
CHIPS = (
    "NCCL", "TORCH_NCCL", "RCCL", "HIP", "HSA", "ROCR",  # CUDA and DCU
    "ASCEND", "HCCL",
    "GLOO", "XTRAIN", "DS_ACCELERATOR", "OMP_NUM_THREADS",
)  # fmt: skip
"""Those of the backends. All of them, since the machine that launches need not have the chip."""
PATHS = ("LD_LIBRARY", "PATH")
"""Where an ASCEND variable is set: CANN's set_env.sh, which sets them, sets these as well."""
NEVER = (
    "HIP_VISIBLE_DEVICES",
    "ASCEND_RT_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "XTRAIN_RUN_DIR",
    "XTRAIN_LAUNCHER_PID",
)
"""What is about this machine or process alone."""
_PER_NODE = {"AISC_JOB_NAME": ("NCCL_IB_HCA", "UCX_NET_DEVICES")}
"""Where the first is set, each node has its own values of the others."""


def environment_file(environ: Mapping[str, str]) -> str:
    """The name of the file with more variables."""
    return environ.get("DS_ENV_FILE", ".deepspeed_env")


def read_environment_file(path: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """NAME=VALUE lines. Quotes around a value are taken off, and $NAME in it stands for this machine's variable.

    Raises:
        ConfigError: a line has no =.
    """
    found = {}
    for number, line in enumerate(map(str.strip, path.read_text().splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        name = name.strip().removeprefix("export ").strip()
        if not equals:
            raise ConfigError(f"{path}, line {number}: {line!r} is not of the form NAME=VALUE")
        if not name.isidentifier():  # Accelerate writes down whatever its environment has
            logger.warning(
                "%s, line %d: no shell takes %r for a variable's name; it is left out", path, number, name
            )
            continue
        found[name] = _value(value.strip(), environ)
    return found


def _value(text: str, environ: Mapping[str, str]) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    inner = text[1:-1] if quoted else text
    if quoted and text[0] == "'":
        return inner
    return re.sub(r"\$(\w+|\{\w+\})", lambda match: environ.get(match[1].strip("{}"), ""), inner)


def exports(environ: Mapping[str, str], cwd: Path, beginnings: Iterable[str] = BEGINNINGS) -> dict[str, str]:
    """What ranks on other machines get.

    The working folder comes first on their PYTHONPATH. `.deepspeed_env` (or what DS_ENV_FILE says) is read from
    the home folder, then from the working folder, which wins.

    Args:
        beginnings: of the names that are taken, besides those of the backends.

    Raises:
        ConfigError: the file has a line without =.
    """
    cann = any(name.startswith("ASCEND") for name in environ)
    names = (*beginnings, *CHIPS, *(PATHS if cann else ()))
    never = {*NEVER, *(name for key, those in _PER_NODE.items() if key in environ for name in those)}
    found = {key: value for key, value in environ.items() if key.startswith(names) and key not in never}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(cwd), environ.get("PYTHONPATH"))))
    home = Path(environ.get("HOME", "~")).expanduser()
    for path in dict.fromkeys(folder / environment_file(environ) for folder in (home, cwd)):
        if path.is_file():
            found |= read_environment_file(path, environ)
    return found
