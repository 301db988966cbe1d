"""The `xtrain` logger and rank-aware messages."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from xtrain.base.errors import ConfigError

logger = logging.getLogger("xtrain")


def configure(level: int | str | None = None) -> None:
    """Attach a stderr handler once, unless the application has configured logging itself.

    Args:
        level: None: what XTRAIN_LOG_LEVEL says, else what the script has set, else INFO.
    """
    chosen = level or os.environ.get("XTRAIN_LOG_LEVEL") or logger.level or logging.INFO
    try:
        logger.setLevel(chosen.upper() if isinstance(chosen, str) else chosen)
    except ValueError:
        raise ConfigError(
            f"log level {chosen!r} is unknown: use debug, info, warning, error or critical"
        ) from None
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(asctime)s] [xtrain] %(levelname)s: %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log on the given ranks only (None or [-1]: on all), as `deepspeed.utils.log_dist` does.

    The rank is read from the environment of the launcher, so that this also works before the process
    group exists.
    """
    rank = int(os.environ.get("RANK", "0"))
    if ranks is None or -1 in ranks or rank in ranks:
        logger.log(level, "%s", message)


def is_among(ranks: Sequence[int] | None) -> bool:
    """Whether this process is one of the ranks (None, nothing or [-1]: all), by the launcher's environment."""
    rank = int(os.environ.get("RANK", "0"))
    return not ranks or -1 in ranks or rank in ranks


def print_dist(message: str, ranks: Sequence[int] | None = None) -> None:
    """Print on the given ranks only (None or [-1]: on all)."""
    if is_among(ranks):
        print(f"[Rank {os.environ.get('RANK', '0')}] {message}")
