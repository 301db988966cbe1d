"""What a communication function has around it: a sentence for its errors, a line in the ledger, its time in the log.

As in DeepSpeed, `prof` times a call while the communication log is on but not for every operation, and `log_name` is
the name it is summed up under; `debug` is the name of the caller, which the log shows in its debug mode (None: it is
found out). All functions take these three.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from xtrain.comm.failures import explained
from xtrain.comm.ledger import ledger
from xtrain.comm.timing import Running, comms_logger, finish

Group = dist.ProcessGroup | None

P = ParamSpec("P")
R = TypeVar("R")


def count(
    operation: str,
    message_bytes: int,
    group: Group,
    sent_bytes: int | None = None,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Running | None:
    """Record one call in the ledger, and start its clock if it is to be timed.

    Args:
        sent_bytes: by this rank, where it does not follow from the operation.
    """
    name, ranks = "world" if group is None else group.group_name, dist.get_world_size(group)
    ledger.record(operation, name, ranks, message_bytes, sent_bytes)
    if not comms_logger.enabled:
        return None
    return comms_logger.begin(operation, message_bytes, ranks, log_name, prof, debug)


def bytes_of(tensors: torch.Tensor | list[torch.Tensor]) -> int:
    """Of one tensor or of all in a list."""
    return tensors.nbytes if isinstance(tensors, torch.Tensor) else sum(tensor.nbytes for tensor in tensors)


def counted(
    operation: str,
    size: str | Callable[..., int],
    sent: Callable[..., int | None] | None = None,
    name: str | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function that communicates a communication function of xtrain.

    Args:
        operation: for the ledger.
        size: bytes of the full message: the parameter that holds its tensors, or a function of the call's arguments.
        sent: bytes that this rank sends, as such a function; None, or one of it, where it follows from the operation.
        name: for the log; None: the operation's.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = dict(inspect.signature(function).parameters)
        defaults = {key: each.default for key, each in parameters.items() if each.default is not each.empty}

        @explained
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given: dict[str, Any] = {**defaults, **dict(zip(parameters, args, strict=False)), **kwargs}
            if given.keys() != parameters.keys() or len(args) > len(parameters):
                return function(*args, **kwargs)  # Python says what is wrong with them
            message = bytes_of(given[size]) if isinstance(size, str) else size(**given)
            mine = None if sent is None else sent(**given)
            log_name = given["log_name"] or name
            clock = count(operation, message, given["group"], mine, given["prof"], log_name, given["debug"])
            result: R = finish(clock, function(*args, **kwargs))
            return result

        return call

    return decorate
