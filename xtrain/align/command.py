"""Runs a user's command into a run folder and a log, for envelopes and bisections; what became of it they say."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from xtrain.base.errors import RecordError
from xtrain.base.run_folder import RUN_DIR_VARIABLE

RUN = "{run}"
"""In a command: the folder of the run."""
_LAST_LINES = 5


def run_command(
    command: list[str], folder: Path, log: Path, words: Mapping[str, str], env: Mapping[str, str]
) -> int:
    """Run the command with XTRAIN_RUN_DIR set; returns its exit status.

    Args:
        folder: of the run, which `{run}` means; it exists.
        log: receives everything that is printed.
        words: more of what `{…}` in the command means.
        env: variables besides those of this process.

    Raises:
        RecordError: the command cannot be started at all.
    """
    filled = []
    for word in command:
        for name, meaning in {RUN: str(folder), **words}.items():
            word = word.replace(name, meaning)
        filled.append(word)
    env = {**os.environ, **env, RUN_DIR_VARIABLE: str(folder)}
    try:
        with log.open("wb") as output:
            return subprocess.run(filled, env=env, stdout=output, stderr=subprocess.STDOUT).returncode
    except OSError as error:
        raise RecordError(f"{shlex.quote(filled[0])} cannot be run: {error.strerror}") from None


def last_lines(log: Path) -> str:
    """The end of a log in one line."""
    return " / ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:])
