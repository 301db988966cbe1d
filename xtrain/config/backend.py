"""The backend that a config asks for."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

from xtrain.backends import Backend, EmulatingBackend, registry
from xtrain.base.errors import ConfigError
from xtrain.base.log import log_dist
from xtrain.config.load import XtrainConfig

emulated: weakref.WeakSet[Any] = weakref.WeakSet()
"""What trains in this process on a backend that emulates another chip: such a backend lends its operators to all."""


def choose_backend(config: XtrainConfig | None) -> Backend:
    """The backend that the config, the environment or the machine names, with its settings.

    Raises:
        BackendError, ConfigError: it cannot be used here, or the settings are another's.
    """
    section = None if config is None else config.values.xtrain
    backend = registry.detect(None if section is None else section.backend)
    settings = None
    if section is not None and section.fake is not None:
        settings = section.fake.model_dump(exclude_none=True)
    if isinstance(backend, EmulatingBackend):
        backend.configure(settings)
        return backend
    _end_emulation(backend)
    if settings is not None:
        raise ConfigError(
            f"config key 'xtrain.fake' is for backend 'fake', and the backend is {backend.name!r}: set "
            "'xtrain.backend' to \"fake\", or remove the key"
        )
    return backend


def _end_emulation(backend: Backend) -> None:
    """Let the host compute for an engine on another backend, unless one that emulates is still in use."""
    for other in registry.used():
        if not isinstance(other, EmulatingBackend):
            continue
        if emulated:
            gc.collect()  # an engine is in cycles of references
        if not emulated:
            other.release()
            continue
        log_dist(
            f"an engine on backend {other.name!r} is alive, whose operators an engine on {backend.name!r} in this "
            "process gets too: call destroy() on the former first",
            level=logging.WARNING,
        )
