"""DeepSpeed's `deepspeed.utils.logging`, on xtrain's logger."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtrain.base.errors import ConfigError, unknown_name
from xtrain.base.files import write_text
from xtrain.base.log import is_among, log_dist, logger, print_dist

__all__ = [
    "LoggerFactory",
    "get_current_level",
    "get_log_level_from_string",
    "log_dist",
    "log_dist_once",
    "log_levels",
    "logger",
    "print_configuration",
    "print_dist",
    "print_json_dist",
    "set_log_level_from_string",
    "should_log_le",
    "warning_once",
]

log_levels = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


class LoggerFactory:
    """Makes loggers that write to standard output, as DeepSpeed's own looks."""

    @staticmethod
    def create_logger(name: str | None = None, level: int = logging.INFO) -> logging.Logger:
        """The logger of this name, which passes nothing on to the root logger; made once.

        Raises:
            ConfigError: no name.
        """
        if name is None:
            raise ConfigError("LoggerFactory.create_logger() needs a name")
        made = logging.getLogger(name)
        made.setLevel(level)
        made.propagate = False
        if not made.handlers:
            handler = logging.StreamHandler(sys.stdout)
            handler.setLevel(level)
            handler.setFormatter(
                logging.Formatter(
                    "[%(asctime)s] [%(levelname)s] [%(filename)s:%(lineno)d:%(funcName)s] %(message)s"
                )
            )
            made.addHandler(handler)
        return made


@functools.lru_cache(None)
def _once(message: str, ranks: tuple[int, ...] | None, level: int) -> None:
    log_dist(message, ranks, level)


def log_dist_once(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """`log_dist`, but not twice with the same arguments."""
    _once(message, None if ranks is None else tuple(ranks), level)


@functools.lru_cache(None)
def warning_once(message: str) -> None:
    """A warning, but not the same one twice."""
    logger.warning("%s", message)


def print_json_dist(
    message: dict[str, Any], ranks: Sequence[int] | None = None, path: str | Path | None = None
) -> None:
    """Write a dictionary, with the rank in it, as JSON to `path` on the given ranks only.

    Raises:
        ConfigError: no path.
    """
    if path is None:
        raise ConfigError("print_json_dist() needs a path to write to")
    if is_among(ranks):
        write_text(Path(path), json.dumps({**message, "rank": int(os.environ.get("RANK", "0"))}))


def print_configuration(args: Any, name: str) -> None:
    """Log an object's attributes, a line each, in the order of their names."""
    logger.info("%s:", name)
    for key, value in sorted(vars(args).items()):
        logger.info("  %s %s %s", key, "." * (29 - len(key)), value)


def get_log_level_from_string(log_level_str: str) -> int:
    """The number of a level's name.

    Raises:
        ConfigError: an unknown name.
    """
    if log_level_str.lower() not in log_levels:
        raise ConfigError(unknown_name("log level", log_level_str, log_levels))
    return log_levels[log_level_str.lower()]


def set_log_level_from_string(log_level_str: str, custom_logger: logging.Logger | None = None) -> None:
    """Set a logger's level (None: xtrain's) by name."""
    (custom_logger or logger).setLevel(get_log_level_from_string(log_level_str))


def get_current_level() -> int:
    """The level of xtrain's logger."""
    return logger.getEffectiveLevel()


def should_log_le(max_log_level_str: str) -> bool:
    """Whether messages of this level, or of a lower one, are logged."""
    return get_current_level() <= get_log_level_from_string(max_log_level_str)
