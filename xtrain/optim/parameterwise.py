"""Optimizers whose update of an element depends on the whole parameter, over slices that cut through parameters.

An element-wise optimizer needs nothing but its tensors. A `ParameterwiseOptimizer` is told, once, which
elements of which parameters its tensors hold on which rank. Alone, outside of an engine, each of its
tensors is a parameter. It knows nothing of buckets, stages or masters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from xtrain.backends import registry
from xtrain.backends.backend import PrecisionFacet
from xtrain.optim.chunked import ChunkedOptimizer


class Fragment(NamedTuple):
    """Elements [start, stop) of a flattened parameter, held by a rank of the group."""

    rank: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many elements."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class ParamFragments:
    """One parameter, as the ranks hold it.

    Attributes:
        parameter: the model's. Its data may be elsewhere: read attributes, not values.
        shape: of the parameter.
        tensor: the optimizer's tensor that this rank's elements are in.
        offset: of the first of them in it.
        own: which elements this rank holds (length 0 for none).
        fragments: all ranks' elements, in order; ranks that hold none are left out.
    """

    parameter: torch.Tensor
    shape: torch.Size
    tensor: torch.Tensor
    offset: int
    own: Fragment
    fragments: tuple[Fragment, ...]

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's elements of the parameter in a tensor that is laid out like `tensor`: a view, in one dimension
        unless the tensor's memory has gaps."""
        if whole.numel() == self.own.length and not whole.is_contiguous():
            return whole
        return whole.view(-1)[self.offset : self.offset + self.own.length]


def shape_of(param: torch.Tensor) -> torch.Size:
    """A parameter's shape, also where ZeRO stage 3 has divided its data."""
    shape: torch.Size = getattr(param, "ds_shape", param.shape)
    return shape


def _alone(param: torch.Tensor) -> ParamFragments:
    own = Fragment(0, 0, param.numel())
    return ParamFragments(param, param.shape, param, 0, own, (own,))


class ParameterwiseOptimizer(ChunkedOptimizer):
    """Base of optimizers that need more of a parameter than the elements of one slice.

    Attributes:
        process_group, ranks: over which parameters are divided; one rank when they are not.
        given: the parameters, in the order of the parameter groups.
        precision: the backend's, for the dtype of long sums.
        aligned: whether bits must be the same on every kind of device.
    """

    rewrites_gradients = False
    """Whether `rewrite_gradients` makes the update out of the gradients before they are clipped."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.given: list[torch.Tensor] = [param for group in self.param_groups for param in group["params"]]
        self.process_group: dist.ProcessGroup | None = None
        self.ranks = 1
        backend = registry.detect()
        self.precision: PrecisionFacet = backend.precision
        self.aligned = False
        self.chunk_size = backend.zero.update_chunk
        self._attached: list[list[ParamFragments]] | None = None

    def attach(
        self,
        param_fragments: list[list[ParamFragments]],
        process_group: dist.ProcessGroup | None,
        ranks: int,
        precision: PrecisionFacet,
        aligned: bool,
    ) -> None:
        """Work on slices from now on.

        Args:
            param_fragments: for each parameter group; the same parameters in the same order on every rank.
            process_group, ranks: over which parameters are divided; 1 when every rank holds all.
        """
        self._attached = param_fragments
        self.process_group = process_group
        self.ranks = ranks
        self.precision = precision
        self.aligned = aligned

    @property
    def attached(self) -> bool:
        """Whether this works on slices, for an engine."""
        return self._attached is not None

    def param_fragments(self) -> Iterator[tuple[dict[str, Any], Sequence[ParamFragments]]]:
        """(parameter group, its parameters); parameters without a gradient are left out when alone."""
        for index, group in enumerate(self.param_groups):
            if self._attached is not None:
                yield group, self._attached[index]
            else:
                yield group, [_alone(param) for param in group["params"] if param.grad is not None]

    def rewrite_gradients(self) -> None:
        """Make the update out of `grad` of each tensor, in place; collective over the group."""
        raise NotImplementedError

    def update_all(self) -> None:
        """One update; collective over the group that parameters are divided over."""
        if self.rewrites_gradients and not self.attached:
            self.rewrite_gradients()
        self.update()

    @abstractmethod
    def update(self) -> None:
        """Update every parameter from `grad` of its tensor."""
