"""`xtrain shims DIR`: DeepSpeed's commands for the PATH, so that other people's shell scripts run on xtrain unchanged.

For the processes that they start, `import deepspeed` is xtrain: DIR/python, first on their PYTHONPATH, has a package of
this name that hands over to xtrain.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from xtrain.base import errors
from xtrain.base.errors import ConfigError
from xtrain.launch.processes import python_module

_MARK = "written by `xtrain shims`"
API_VERSION = "0.19.8"
"""The version that `deepspeed` has for programs that ask the installed packages; as_deepspeed.py says the same."""

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
_PACKAGE = f'''"""xtrain under the name deepspeed, {_MARK}."""

import sys

del sys.modules["deepspeed"]  # this file; the next line puts xtrain there
import xtrain.as_deepspeed
'''
_METADATA = (
    f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {API_VERSION}\nSummary: xtrain under this name\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xtrain shims`."""
    parser.add_argument("folder", metavar="DIR", help="where the commands go; it is made")


def _python_path(folder: Path, environ: Mapping[str, str]) -> list[str]:
    """What comes first on the PYTHONPATH of everything that a shim starts."""
    root = Path(errors.__file__).absolute().parents[2]
    given = [Path(entry).absolute() for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    # An installed xtrain is found anyway; one that this process has by its PYTHONPATH would be lost.
    return [str(folder / "python"), *([str(root)] if root in given else [])]


def _shim(command: tuple[str, ...], path: list[str]) -> str:
    python = shlex.join(python_module(*command))
    first = shlex.quote(os.pathsep.join(path))
    return (
        f"#!/bin/sh\n# {_MARK}\n"
        f'PYTHONPATH={first}"${{PYTHONPATH:+:$PYTHONPATH}}"\nexport PYTHONPATH\n'
        f'exec {python} "$@"\n'
    )


def _refusal(name: str, instead: str) -> str:
    message = shlex.quote(f"{name} is not there in xtrain: {instead}")
    return f"#!/bin/sh\n# {_MARK}\necho {message} >&2\nexit 2\n"


def write(folder: Path, environ: Mapping[str, str]) -> list[str]:
    """Write the commands, and the package `deepspeed`; returns the commands' names.

    Raises:
        ConfigError: the folder cannot be written, or has one of these files from elsewhere.
    """
    folder = folder.expanduser().absolute()
    path = _python_path(folder, environ)
    files = {name: _shim(command, path) for name, command in _COMMANDS.items()}
    files |= {name: _refusal(name, instead) for name, instead in _REFUSED.items()}
    package = {
        "python/deepspeed/__init__.py": _PACKAGE,
        f"python/deepspeed-{API_VERSION}.dist-info/METADATA": _METADATA,
    }
    for name in files:
        there = folder / name
        if there.is_symlink() or (there.exists() and _MARK not in there.read_text(errors="replace")):
            raise ConfigError(f"{there} is there already, and not from xtrain: choose another folder")
    try:
        for name, text in {**files, **package}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        for name in files:
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
    print(
        "for programs that import deepspeed, and are not started by these commands (accelerate launch, torchrun):"
    )
    print(f'  export PYTHONPATH={shlex.quote(str(folder / "python"))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    return 0
