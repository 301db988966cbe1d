"""DeepSpeed's `deepspeed.utils`: logging, parameters' divided states, groups, meta-device construction."""

from xtrain.base.log import log_dist, logger  # noqa: F401
from xtrain.deepspeed_api.compat import packages
from xtrain.engine.dataloader import RepeatingLoader  # noqa: F401
from xtrain.utils import groups, logging  # noqa: F401
from xtrain.utils.init_on_device import OnDevice  # noqa: F401
from xtrain.utils.logging import log_dist_once, set_log_level_from_string  # noqa: F401
from xtrain.utils.nvtx import instrument_w_nvtx  # noqa: F401
from xtrain.zero.leaf_modules import *  # noqa: F403
from xtrain.zero.tensor_fragment import *  # noqa: F403

__getattr__ = packages.attributes(__name__)
