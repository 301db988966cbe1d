"""What a library says when a peer is lost, as one sentence: library, rank, operation, who has ended, the cause.

Errors of other kinds (a dtype that the library lacks, a wrong shape) pass as they are.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from xtrain.base.errors import PeerLostError, XtrainError
from xtrain.comm import meeting
from xtrain.comm.whereabouts import Place

_MESSAGES = frozenset({"send", "recv", "isend", "irecv", "batch_isend_irecv"})
"""Between two ranks: the others need not make as many calls."""

P = ParamSpec("P")
R = TypeVar("R")

_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|connection was likely closed|socket closed"
    r"|failed to recv|no route to host|remote process exited|network error",
    re.IGNORECASE,
)
_LATE = re.compile(r"timed out|timeout", re.IGNORECASE)
_SOURCE = re.compile(r"^\[\S+:\d+\]\s*")


def describe(values: list[Any]) -> str:
    """The tensors of a call: "float32[1000]"; of a list the first, and how many more."""
    tensors = [
        tensor
        for value in values
        for tensor in (value if isinstance(value, list | tuple) else [value])
        if isinstance(tensor, torch.Tensor)
    ]
    if not tensors:
        return ""
    shape = ", ".join(map(str, tensors[0].shape))
    more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
    return f" of {str(tensors[0].dtype).removeprefix('torch.')}[{shape}]{more}"


def explain(
    error: BaseException, operation: str, what: str, group: Any, at: Place | None = None
) -> PeerLostError | None:
    """The sentence for an error of a library; None for an error that has nothing to do with a peer.

    Args:
        at: which collective of which group it was; None for a message.
    """
    cause = _SOURCE.sub("", meeting.first_line(error)).split(" This is typically")[0]
    lost = bool(_LOST.search(cause))
    if isinstance(error, XtrainError) or not (lost or _LATE.search(cause)) or not dist.is_initialized():
        return None
    ranks = dist.get_process_group_ranks(group)
    place = f"backend {dist.get_backend(group)}, rank {dist.get_rank()} of {dist.get_world_size()}"
    gone = meeting.current.gone(ranks) if meeting.current is not None else []
    if gone:
        why = f"{meeting.listed(gone)} {'has' if len(gone) == 1 else 'have'} ended"
    elif absent := _absent(at, ranks, f"{operation}{what}"):
        why = meeting.told_absent(absent)
    elif lost:
        why = "the connection to another rank is lost, which has ended or lost its network"
    else:
        why = "another rank did not take part in time"
    return PeerLostError(f"{place}: {operation}{what} cannot finish: {why} ({cause.rstrip('. ')})")


def _absent(at: Place | None, ranks: list[int], what: str) -> dict[int, str]:
    """Which ranks have not come to the collective, where that can be found out."""
    if at is None or meeting.current is None:
        return {}
    with suppress(RuntimeError):  # the store does not answer
        return meeting.current.whereabouts.absent(at, ranks, what)
    return {}


@contextmanager
def _waiting(what: Callable[[], str]) -> Iterator[None]:
    """Around a wait for other ranks, which are told when it takes long."""
    here = meeting.current
    if here is None:
        yield
        return
    number = here.whereabouts.enter(what)
    try:
        yield
    finally:
        here.whereabouts.leave(number)


class Explained:
    """A running operation whose `wait` raises the sentence."""

    def __init__(self, work: Any, operation: str, what: str, group: Any, at: Place | None) -> None:
        self._work, self._operation, self._what, self._group, self._at = work, operation, what, group, at

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for the operation."""
        try:
            with _waiting(lambda: f"{self._operation}{self._what}"):
                return self._work.wait(*args, **kwargs)
        except RuntimeError as error:
            if (told := explain(error, self._operation, self._what, self._group, self._at)) is None:
                raise
            raise told from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """A communication function whose errors, now or when its result is waited for, are sentences."""
    names = list(inspect.signature(function).parameters)
    name = function.__name__
    place = names.index("group") if "group" in names and not _MESSAGES & {name} else None

    def about(args: Any, kwargs: Any) -> tuple[str, Any]:
        given = dict(zip(names, args, strict=False)) | kwargs
        return describe(list(given.values())), given.get("group")

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        at = None
        if meeting.current is not None and place is not None:
            group = args[place] if len(args) > place else kwargs.get("group")
            at = meeting.current.whereabouts.begin(group)
        try:
            with _waiting(lambda: f"{name}{about(args, kwargs)[0]}"):
                result: Any = function(*args, **kwargs)
        except RuntimeError as error:
            what, group = about(args, kwargs)
            if (told := explain(error, name, what, group, at)) is None:
                raise
            raise told from error
        if isinstance(result, list):
            return [_watched(work, name, *about(args, kwargs), at) for work in result]  # type: ignore[return-value]
        if hasattr(result, "wait"):
            result = _watched(result, name, *about(args, kwargs), at)
        return result

    return call


def _watched(work: Any, operation: str, what: str, group: Any, at: Place | None) -> Any:
    return (
        work if isinstance(work, Explained) or work is None else Explained(work, operation, what, group, at)
    )
