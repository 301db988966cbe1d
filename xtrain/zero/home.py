"""Where the data of a parameter is when it is not (all) in `param.data`.

A parameter that xtrain has taken over carries a `Home`. ZeRO stage 3 leaves `param.data` empty between
uses; the home makes it whole again. The attributes that DeepSpeed gives such parameters (`ds_id`,
`ds_shape`, `ds_numel`, `ds_status`, `ds_persist`: it stays whole, `ds_tensor`: this rank's part,
`ds_active_sub_modules`: users that a script has entered; the engine counts its own in `ParamGroup.users`;
`is_external_param`: whether modules that it does not belong to use it, and what can be called on it, of
param_calls.py) are set here too, because scripts and libraries read them.
"""

from __future__ import annotations

import enum
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from xtrain import comm
from xtrain.zero.param_calls import AllGather, Partition, PartitionNumel

_ids = itertools.count()


class ZeroParamStatus(enum.Enum):
    """Whether a parameter's data is whole; names and values are DeepSpeed's."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class Home(ABC):
    """Makes one parameter whole, and takes changed data back.

    Attributes:
        shape: the parameter's own, whether or not its data is there.
        process_group: the ranks it is divided over, or that hold copies of it.
        kept_by_script: whether it is whole because `param.all_gather()` was called.
    """

    shape: torch.Size
    process_group: dist.ProcessGroup | None
    kept_by_script = False

    def __reduce__(self) -> tuple[Any, ...]:
        """None in a pickle (`torch.save(model)`): buffers and process groups stay with this process."""
        return type(None), ()

    @abstractmethod
    def unshard(self) -> None:
        """Make `param.data` whole until `reshard` was called as often. Collective where it is divided."""

    @abstractmethod
    def reshard(self) -> None:
        """Undo one `unshard`."""

    @abstractmethod
    def store(self, whole: torch.Tensor) -> None:
        """Make `whole` (any shape with as many elements) the parameter's value; not collective."""

    def cast(self, dtype: torch.dtype) -> None:
        """Change the dtype of data that is not in `param.data`."""
        raise TypeError(f"the parameters of {type(self).__name__} have the dtype of their flat group")


def home_of(param: torch.Tensor) -> Home | None:
    """The parameter's home; None for an ordinary tensor."""
    return getattr(param, "_xtrain_home", None)


def set_home(param: torch.nn.Parameter, home: Home) -> None:
    """Let `home` take over the parameter."""
    param._xtrain_home = home  # type: ignore[attr-defined]


def full_shape(param: torch.Tensor) -> torch.Size:
    """The parameter's shape, whether or not its data is there."""
    home = home_of(param)
    return param.shape if home is None else home.shape


def describe_partitioned(param: torch.nn.Parameter, shape: torch.Size) -> None:
    """Give a parameter DeepSpeed's attributes of stage 3."""
    if not hasattr(param, "ds_id"):
        param.ds_id = next(_ids)  # type: ignore[attr-defined]
    param.ds_shape, param.ds_numel = shape, shape.numel()  # type: ignore[attr-defined]
    param.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
    param.ds_persist = False  # type: ignore[attr-defined]
    param.ds_active_sub_modules = set()  # type: ignore[attr-defined]
    param.partition_numel = PartitionNumel(param)  # type: ignore[attr-defined]
    param.all_gather = param.all_gather_coalesced = AllGather(param)  # type: ignore[attr-defined]
    param.partition = Partition(param)  # type: ignore[attr-defined]
    if not hasattr(param, "is_external_param"):
        param.is_external_param = False  # type: ignore[attr-defined]


def empty_out(param: torch.nn.Parameter) -> None:
    """Leave `param.data` without elements."""
    param.data = torch.empty(0, dtype=param.dtype, device=param.device)
    param.ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]


def fill_in(param: torch.nn.Parameter, whole: torch.Tensor) -> None:
    """Make `whole`, in the parameter's shape, its data."""
    param.data = whole
    param.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]


def make_ordinary(param: torch.nn.Parameter) -> None:
    """Give a parameter all of its data and take its home away. Collective where it is divided."""
    if home_of(param) is not None:
        with whole(param) as data:
            own = data.clone()
        param.data = own
        if hasattr(param, "ds_status"):
            param.ds_status = ZeroParamStatus.AVAILABLE
        del param._xtrain_home  # type: ignore[attr-defined]


@contextmanager
def whole(param: torch.nn.Parameter) -> Iterator[torch.Tensor]:
    """The parameter's whole data for the length of the context. Collective where it is divided."""
    home = home_of(param)
    if home is None:
        yield param.data
        return
    home.unshard()
    try:
        yield param.data
    finally:
        home.reshard()


class LooseShard(Home):
    """A parameter made under `zero.Init`: each rank keeps an equal part, until an engine takes it over.

    Args:
        param: whole on every rank; the first rank's values are taken.
        process_group: the ranks to divide it over.
        source: global rank of the first of them.
    """

    def __init__(
        self, param: torch.nn.Parameter, process_group: dist.ProcessGroup | None, source: int
    ) -> None:
        self.param = param
        self.shape = param.shape
        self.process_group = process_group
        self._users = 0
        ranks, rank = comm.get_world_size(process_group), comm.get_rank(process_group)
        width = -(-param.numel() // ranks)
        data = torch.nn.functional.pad(param.detach().reshape(-1), (0, width * ranks - param.numel()))
        if data.numel() and ranks > 1:
            comm.broadcast(data.view(torch.uint8), source, group=process_group)
        self._first = rank * width
        self.shard = data[self._first : self._first + width].clone()
        describe_partitioned(param, self.shape)
        param.ds_tensor = self.shard  # type: ignore[attr-defined]
        set_home(param, self)
        empty_out(param)

    @property
    def held(self) -> bool:
        """Whether the parameter is whole at the moment."""
        return self._users > 0

    def unshard(self) -> None:
        self._users += 1
        if self._users > 1:
            return
        ranks = comm.get_world_size(self.process_group)
        data = self.shard.new_empty(self.shard.numel() * ranks)
        if ranks == 1:
            data.copy_(self.shard)
        elif data.numel():
            comm.all_gather_into_tensor(data, self.shard, group=self.process_group)
        fill_in(self.param, data[: self.shape.numel()].view(self.shape))

    def reshard(self) -> None:
        self._users -= 1
        if self._users == 0:
            empty_out(self.param)

    def store(self, whole: torch.Tensor) -> None:
        mine = whole.detach().reshape(-1)[self._first : self._first + self.shard.numel()]
        self.shard[: mine.numel()].copy_(mine)
        if self._users and whole.data_ptr() != self.param.data.data_ptr():
            self.param.data.copy_(whole.view(self.shape))

    def cast(self, dtype: torch.dtype) -> None:
        self.shard = self.param.ds_tensor = self.shard.to(dtype)  # type: ignore[attr-defined]
        self.param.data = self.param.data.to(dtype)
