"""What every monitor offers, and the import of its package. Which scalars are written is the engine's affair."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtrain.base.errors import ConfigError

Event = tuple[str, Any, int]
"""(tag, value, step); the engine's step is the number of samples trained on so far, over all ranks."""


class Monitor(ABC):
    """One place that scalars are written to. Made on rank 0 only."""

    def __init__(self, monitor_config: Any) -> None:
        self.monitor_config = monitor_config
        self.enabled: bool = monitor_config.enabled

    @abstractmethod
    def write_events(self, event_list: Sequence[Event]) -> None:
        """Write scalars, so that they survive a crash of this process."""

    def close(self) -> None:
        """Finish; nothing is written afterwards."""
        self.enabled = False


def require(package: str, section: str, install: str | None = None) -> Any:
    """Import a monitor's package.

    Args:
        section: of the config that asked for it.
        install: what pip is to be given, when it is not the package's name.

    Raises:
        ConfigError: it is not installed, or cannot be imported (the reason is given).
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == package.partition(".")[0]
        why = "is not installed" if missing else f"cannot be imported ({error})"
        raise ConfigError(
            f"config key '{section}.enabled' is true, but the package {package!r} {why}: "
            f"pip install '{install or package}', or set the key to false"
        ) from error


def job_folder(output_path: str, job_name: str) -> Path:
    """The folder of a job's files, made if it is not there."""
    folder = Path(output_path, job_name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
