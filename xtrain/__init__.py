"""xtrain: the DeepSpeed training API on every accelerator. `import xtrain as deepspeed`.

Names are loaded when first used: `import xtrain` costs nothing, and the command line, which needs no
torch, starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xtrain.base import finders, missing, stand_ins
from xtrain.version import __version__

if TYPE_CHECKING:
    from xtrain import checkpoint, comm
    from xtrain.accelerator import get_accelerator
    from xtrain.activation_checkpointing import checkpointing
    from xtrain.api import add_config_arguments, initialize
    from xtrain.base.errors import ConfigError as DeepSpeedConfigError
    from xtrain.base.log import log_dist, logger
    from xtrain.comm import init_distributed
    from xtrain.engine.dataloader import RepeatingLoader
    from xtrain.reproducible.aligned_draws import aligned_init
    from xtrain.runtime.config import DeepSpeedConfig
    from xtrain.runtime.engine import XtrainEngine
    from xtrain.runtime.engine import XtrainEngine as DeepSpeedEngine
    from xtrain.shims.process import install, uninstall
    from xtrain.utils import OnDevice

_EXPORTS = {
    "aligned_init": "xtrain.reproducible.aligned_draws",
    "initialize": "xtrain.api",
    "install": "xtrain.shims.process",
    "uninstall": "xtrain.shims.process",
    "add_config_arguments": "xtrain.api",
    "init_distributed": "xtrain.comm",
    "XtrainEngine": "xtrain.runtime.engine",
    "DeepSpeedConfig": "xtrain.runtime.config",
    "DeepSpeedConfigError": "xtrain.base.errors",
    "DeepSpeedEngine": "xtrain.runtime.engine",
    "DeepSpeedOptimizerCallable": "xtrain.deepspeed_api.compat.callables",
    "DeepSpeedSchedulerCallable": "xtrain.deepspeed_api.compat.callables",
    "OnDevice": "xtrain.utils",
    "RepeatingLoader": "xtrain.engine.dataloader",
    "TORCH_DISTRIBUTED_DEFAULT_PORT": "xtrain.comm",
    "get_accelerator": "xtrain.accelerator",
    "log_dist": "xtrain.base.log",
    "logger": "xtrain.base.log",
}
_SUBMODULES = (
    "accelerator",
    "backends",
    "checkpoint",
    "comm",
    "config",
    "constants",
    "git_version_info",
    "moe",
    "monitor",
    "ops",
    "optim",
    "parallel",
    "pipe",
    "profiling",
    "runtime",
    "utils",
    "zero",
)
_GIT = {"__git_hash__": "git_hash", "__git_branch__": "git_branch"}
__version_major__, __version_minor__, __version_patch__ = map(int, __version__.split(".")[:3])
_ALIASES = {"DeepSpeedConfigError": "ConfigError", "DeepSpeedEngine": "XtrainEngine"}

__all__ = [
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "DeepSpeedEngine",
    "OnDevice",
    "RepeatingLoader",
    "XtrainEngine",
    "__version__",
    "add_config_arguments",
    "aligned_init",
    "checkpoint",
    "checkpointing",
    "comm",
    "get_accelerator",
    "init_distributed",
    "initialize",
    "install",
    "log_dist",
    "logger",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), _ALIASES.get(name, name))
    elif name in _SUBMODULES:
        value = importlib.import_module(f"xtrain.{name}")
    elif name == "checkpointing":
        value = importlib.import_module("xtrain.activation_checkpointing.checkpointing")
    elif name in _GIT:
        value = getattr(importlib.import_module("xtrain.git_version_info"), _GIT[name])
    elif name == "dist":
        value = importlib.import_module("xtrain.comm")
    elif name.startswith("__"):
        raise AttributeError(f"module 'xtrain' has no attribute {name!r}")
    elif (stand_in := stand_ins.get(name)) is not None:
        value = stand_in
    else:
        raise missing.name_error(name) or AttributeError(
            f"xtrain has no {name!r}, and neither has deepspeed {missing.API_VERSION}: docs/compat.md lists "
            "the names there are"
        )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES})


finders.install()
