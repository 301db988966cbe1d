"""`xtrain shims DIR`: DeepSpeed's commands for the PATH, so that other people's shell scripts run on xtrain unchanged.

For the processes that they start, names mean what they do under `xtrain run`: they set its variables.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from xtrain.base.errors import ConfigError
from xtrain.launch.processes import python_module
from xtrain.shims import process

_MARK = "written by `xtrain shims`"
_COMMANDS = {
    "deepspeed": ("xtrain.cli", "deepspeed"),
    "deepspeed.pt": ("xtrain.cli", "deepspeed"),
    "ds": ("xtrain.cli", "deepspeed"),
    "ds_report": ("xtrain.cli", "doctor"),
    "dsr": ("xtrain.cli", "doctor"),
    "ds_ssh": ("xtrain.launch.deepspeed.ssh_all",),
}
_REFUSED = {
    "ds_bench": "`xtrain doctor` measures the bandwidth between ranks",
    "ds_elastic": "set train_batch_size for the number of ranks that there are",
    "ds_io": "offloaded states are mapped files, which need no tuning",
    "ds_nvme_tune": "offloaded states are mapped files, which need no tuning",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xtrain shims`."""
    parser.add_argument("folder", metavar="DIR", help="where the commands go; it is made")


def _needed(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process with shims."""
    found = {"PYTHONPATH": ""}
    process.environment(environ.get(process.MODE_VARIABLE, "auto"), found)
    return found


def _lines(variables: Mapping[str, str]) -> list[str]:
    """Shell commands that set them, and keep what is there."""
    return [
        f'export PYTHONPATH={shlex.quote(variables["PYTHONPATH"])}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        f'export {process.MODE_VARIABLE}="${{{process.MODE_VARIABLE}:-{variables[process.MODE_VARIABLE]}}}"',
    ]


def _shim(command: tuple[str, ...], variables: Mapping[str, str]) -> str:
    lines = [
        "#!/bin/sh",
        f"# {_MARK}",
        *_lines(variables),
        f'exec {shlex.join(python_module(*command))} "$@"',
    ]
    return "\n".join(lines) + "\n"


def _refusal(name: str, instead: str) -> str:
    message = shlex.quote(f"{name} is not there in xtrain: {instead}")
    return f"#!/bin/sh\n# {_MARK}\necho {message} >&2\nexit 2\n"


def write(folder: Path, environ: Mapping[str, str]) -> list[str]:
    """Write the commands; returns their names.

    Raises:
        ConfigError: the folder cannot be written, or has one of these files from elsewhere.
    """
    folder = folder.expanduser().absolute()
    files = {name: _shim(command, _needed(environ)) for name, command in _COMMANDS.items()}
    files |= {name: _refusal(name, instead) for name, instead in _REFUSED.items()}
    for name in files:
        there = folder / name
        if there.is_symlink() or (there.exists() and _MARK not in there.read_text(errors="replace")):
            raise ConfigError(f"{there} is there already, and not from xtrain: choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
    except OSError as error:
        raise ConfigError(f"the commands cannot be written to {folder}: {error}") from None
    return sorted(files)


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    folder = Path(args.folder).expanduser().absolute()
    names = write(folder, os.environ)
    print(f"{folder} has {', '.join(names)}; put them first on the PATH:")
    print(f'  export PATH={shlex.quote(str(folder))}:"$PATH"')
    print("for programs that import deepspeed, and are not started by these commands or by `xtrain run`:")
    print("\n".join(f"  {line}" for line in _lines(_needed(os.environ))))
    return 0
