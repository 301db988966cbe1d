"""What can be called on a divided parameter itself: `param.partition_numel()`, `param.all_gather()` and so on.

DeepSpeed puts these on parameters, and scripts that move a few of them by hand call them. `zero.GatheredParameters` is
the better way: it cannot be left open.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch


class _Home(Protocol):
    """What is needed of home.py's Home here."""

    shape: torch.Size
    kept_by_script: bool

    def unshard(self) -> None: ...

    def reshard(self) -> None: ...

    def store(self, whole: torch.Tensor) -> None: ...


class _OfParameter:
    def __init__(self, param: torch.nn.Parameter) -> None:
        self._param = weakref.ref(param)  # which leads here

    def _or_those(self, params: Iterable[torch.nn.Parameter] | None) -> list[torch.nn.Parameter]:
        """`params`; without, the parameter itself."""
        own = self._param()
        return list(params) if params is not None else [own] if own is not None else []

    def __reduce__(self) -> tuple[Any, ...]:
        """None in a pickle, as `Home`."""
        return type(None), ()


def _home_of(param: torch.nn.Parameter) -> _Home | None:
    return getattr(param, "_xtrain_home", None)


class PartitionNumel(_OfParameter):
    """`param.partition_numel()`."""

    def __call__(self) -> int:
        """Elements of this rank's part; none when the parameter is gone."""
        part: torch.Tensor | None = getattr(self._param(), "ds_tensor", None)
        return 0 if part is None else part.numel()


class Gathering:
    """What `param.all_gather_coalesced()` returns."""

    def wait(self, **_: Any) -> None:
        """Nothing is left to wait for: what was called has waited."""


class AllGather(_OfParameter):
    """`param.all_gather()` and `param.all_gather_coalesced()`."""

    def __call__(self, params: Iterable[torch.nn.Parameter] | None = None, **_: Any) -> Gathering:
        """Make parameters whole until `param.partition()`; those that are stay as they are. Collective.

        Args:
            params: which; without, the one that it is called on. DeepSpeed's other arguments say how to gather, and
                change nothing.
        """
        for param in self._or_those(params):
            home = _home_of(param)
            if home is not None and not home.kept_by_script and not param.numel() and home.shape.numel():
                home.kept_by_script = True
                home.unshard()
        return Gathering()


class Partition(_OfParameter):
    """`param.partition()`."""

    def __call__(
        self,
        param_list: Iterable[torch.nn.Parameter] | None = None,
        hierarchy: int = 0,
        has_been_updated: bool = False,
        free_data: bool = True,
    ) -> None:
        """Divide again what `all_gather` has made whole; other parameters stay as they are.

        Args:
            param_list: which; without, the one that it is called on.
            hierarchy: of DeepSpeed's groups of ranks; changes nothing.
            has_been_updated: keep this rank's part of what the script has written. It must be the same on all ranks.
            free_data: False: leave the data whole.
        """
        for param in self._or_those(param_list):
            home = _home_of(param)
            if home is None or not home.kept_by_script:
                continue
            if has_been_updated:
                home.store(param.data)
            if free_data:
                home.kept_by_script = False
                home.reshard()
