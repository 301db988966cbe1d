"""Whether a run folder was written by this user: what it says about environment, script and backend runs code.

The launcher signs the settings that it writes with a key in the user's own configuration folder. A folder of somebody
else, or one whose settings were changed, has no such signature, even where it was copied.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path
from typing import Any

from xtrain.base.errors import ConfigError
from xtrain.base.files import write_text

SIGNATURES = "signatures.json"
_CODE = ("cluster", "script", "script_args", "backend", "deepspeed_config", "deepspeed", "hydra")
"""Settings that decide what is run, on which machines, and in which environment."""


def _key() -> bytes | None:
    """The user's key, made when there is none; None where the user has no folder to keep it in."""
    home = os.environ.get("XDG_CONFIG_HOME") or str(Path("~/.config").expanduser())
    path = Path(home) / "xtrain" / "key"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(32))
        if path.stat().st_uid != os.getuid():
            return None
        return path.read_bytes()
    except OSError:
        return None


def _signature(key: bytes, path: Path) -> str:
    return hmac.new(key, path.read_bytes(), hashlib.sha256).hexdigest()


def sign(folder: Path, names: list[str]) -> None:
    """Say that these files of a run folder are this user's."""
    key = _key()
    if key is not None:
        write_text(folder / SIGNATURES, json.dumps({name: _signature(key, folder / name) for name in names}))


def is_own(path: Path) -> bool:
    """Whether this user's launcher has written the file as it is now."""
    key, signatures = _key(), path.parent / SIGNATURES
    if key is None or not signatures.is_file() or not path.is_file():
        return False
    try:
        said = json.loads(signatures.read_text())[path.name]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(said, str) and hmac.compare_digest(said, _signature(key, path))


def check_overrides(path: Path, saved: list[str], given: list[str], trusted: bool) -> None:
    """Refuse what a foreign run folder says to run, unless it is repeated or the user trusts the folder.

    Raises:
        ConfigError: naming the first such setting.
    """
    if trusted or is_own(path):
        return
    for item in saved:
        key = item.lstrip("+~").partition("=")[0]
        if key.partition(".")[0].partition("@")[0] in _CODE and item not in given:
            raise ConfigError(
                f"{path} says {item}, which decides what is run, and was not written by your launcher: repeat it on "
                "the command line, or say --trust if all that it says may be run"
            )


_RUNS = ("script", "script_args", "deepspeed_config")
_RUNS_IN_CLUSTER = ("launcher", "env", "python", "ssh", "slurm", "mpi", "hosts", "hostfile")


def check_configuration(path: Path, tree: dict[str, Any], usual: dict[str, Any], trusted: bool) -> None:
    """Refuse to run what the config.yaml of a foreign run folder says beyond the usual.

    Args:
        usual: the configuration without any settings.

    Raises:
        ConfigError: naming the first setting that decides what is run.
    """
    if trusted or is_own(path):
        return
    places: list[tuple[tuple[str, ...], Any, Any]] = [((key,), tree.get(key), usual[key]) for key in _RUNS]
    cluster: dict[str, Any] = tree.get("cluster") or {}
    places += [(("cluster", key), cluster.get(key), usual["cluster"][key]) for key in _RUNS_IN_CLUSTER]
    for names, value, normal in places:
        if value != normal and value not in (None, []):
            raise ConfigError(
                f"{path} says {'.'.join(names)}={value}, which decides what is run, and was not written by your "
                "launcher: say --trust if it may be run"
            )
