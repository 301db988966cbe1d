"""`deepspeed.utils.comms_logging`: the log of collectives with its times; see xtrain.comm.timing."""

from xtrain.comm.timing import CommsLogger

__all__ = ["CommsLogger"]
