"""DeepSpeed's `deepspeed.utils`: logging, parameters' divided states, groups, meta-device construction."""

from xtrain.base.log import log_dist, logger
from xtrain.deepspeed_api.compat import packages
from xtrain.engine.dataloader import RepeatingLoader
from xtrain.utils import groups, logging
from xtrain.utils.init_on_device import OnDevice
from xtrain.utils.logging import log_dist_once, set_log_level_from_string
from xtrain.utils.numa import get_numactl_cmd
from xtrain.utils.nvtx import instrument_w_nvtx

# By these paths, and not from xtrain.zero: `z3_leaf_module` is a module here and, from this line on, the function.
from xtrain.utils.tensor_fragment import *  # noqa: F403
from xtrain.utils.z3_leaf_module import *  # noqa: F403
from xtrain.zero import leaf_modules as _leaf_modules
from xtrain.zero import tensor_fragment as _tensor_fragment

__all__ = [
    "OnDevice",
    "RepeatingLoader",
    "get_numactl_cmd",
    "groups",
    "instrument_w_nvtx",
    "log_dist",
    "log_dist_once",
    "logger",
    "logging",
    "set_log_level_from_string",
]
__all__ += _leaf_modules.__all__
__all__ += _tensor_fragment.__all__

__getattr__ = packages.attributes(__name__)
