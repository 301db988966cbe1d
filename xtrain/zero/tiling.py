"""`TiledLinear`: a linear layer cut into tiles, of which ZeRO stage 3 has only the running one whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from xtrain.base.errors import ConfigError, XtrainError
from xtrain.zero.gathered import GatheredParameters


class TilingError(XtrainError, RuntimeError):
    """A layer cannot be cut into so many tiles."""


def _bounds(features: int, splits: int, what: str) -> list[int]:
    """Where the parts of `features` begin, and where the last ends; the first parts are larger by one."""
    if not 1 <= splits <= features:
        raise TilingError(f"TiledLinear: {what} must be between 1 and the {features} features, not {splits}")
    short, longer = divmod(features, splits)
    return [number * short + min(number, longer) for number in range(splits + 1)]


class TiledLinear(nn.Module):
    """y = x Wᵀ + b with W in `out_splits` x `in_splits` tiles, each a layer of its own.

    In stage 3 one tile at a time is whole, so that a layer may be larger than the memory that is left for it.

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`.
        in_splits: tiles along the input.
        out_splits: tiles along the output.
        input_is_already_split: forward gets a list of `in_splits` tensors.
        combine_out_splits: concatenate the outputs; False: return a list of `out_splits` tensors.
        linear_cls: class of a tile.
        init_linear: a layer whose values to copy.
        kwargs: more arguments of `linear_cls`.

    Attributes:
        linears: tile [output part][input part]; the last of each row has the bias.
        in_parts, out_parts: where the parts begin and end.

    Source: https://deepspeed.readthedocs.io/en/latest/zero3.html#memory-centric-tiling
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: type[nn.Module] = nn.Linear,
        init_linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.in_splits, self.out_splits = in_splits, out_splits
        self.input_is_already_split = input_is_already_split
        self.combine_out_splits = combine_out_splits
        self.in_parts = _bounds(in_features, in_splits, "in_splits")
        self.out_parts = _bounds(out_features, out_splits, "out_splits")
        self.linears = nn.ModuleList()
        for row in range(out_splits):
            height = self.out_parts[row + 1] - self.out_parts[row]
            tiles = [
                linear_cls(
                    self.in_parts[column + 1] - self.in_parts[column],
                    height,
                    bias=bias and column == in_splits - 1,
                    **kwargs,
                )
                for column in range(in_splits)
            ]
            self.linears.append(nn.ModuleList(tiles))
        if init_linear is not None:
            self.copy_params_from(init_linear)

    def _tiles(self, row: int) -> Sequence[nn.Module]:
        tiles = self.linears[row]
        assert isinstance(tiles, nn.ModuleList)
        return list(tiles)

    def forward(self, input_: Any) -> Any:
        """(..., in_features), or `in_splits` tensors, to (..., out_features), or `out_splits` tensors."""
        if self.input_is_already_split and self.in_splits > 1:
            if len(input_) != self.in_splits:
                raise ConfigError(
                    f"TiledLinear: {self.in_splits} inputs were expected, and {len(input_)} given"
                )
            parts = list(input_)
        elif self.in_splits > 1:
            sizes = [stop - start for start, stop in zip(self.in_parts, self.in_parts[1:], strict=False)]
            parts = list(self._split_global_input(input_, sizes))
        else:
            parts = [input_]
        outputs = []
        for row in range(self.out_splits):
            total = None
            for column, (tile, part) in enumerate(zip(self._tiles(row), parts, strict=True)):
                total = self._reduce_local_output(column, row, total, tile(part))
            outputs.append(total)
        return self._combine_output_splits(outputs) if self.combine_out_splits else outputs

    # A subclass for layers that take or return something else replaces these, as in DeepSpeed.

    def _split_global_input(self, input: Any, split_sizes: list[int]) -> Sequence[Any]:
        return torch.split(input, split_sizes, dim=-1)

    def _reduce_local_output(self, in_id: int, out_id: int, current_out: Any, new_out: Any) -> Any:
        return new_out if current_out is None else current_out + new_out

    def _combine_output_splits(self, outputs: list[Any]) -> Any:
        return torch.cat(outputs, dim=-1)

    @torch.no_grad()
    def copy_params_from(self, other: Any) -> None:
        """Take the values of a layer of this size. Collective in stage 3, where those of the first rank are taken.

        Raises:
            ConfigError: its size, or whether it has a bias, is another.
        """
        if tuple(other.weight.shape) != (self.out_features, self.in_features):
            raise ConfigError(
                f"TiledLinear of {self.out_features} x {self.in_features} cannot take a weight of shape "
                f"{tuple(other.weight.shape)}"
            )
        if (getattr(other, "bias", None) is not None) != self.use_bias:
            raise ConfigError("TiledLinear and the layer to copy from must both have a bias, or none")
        for row in range(self.out_splits):
            rows = slice(self.out_parts[row], self.out_parts[row + 1])
            for column, tile in enumerate(self._tiles(row)):
                columns = slice(self.in_parts[column], self.in_parts[column + 1])
                with GatheredParameters(list(tile.parameters(recurse=False)), modifier_rank=0):
                    tile.weight.copy_(other.weight[rows, columns])  # type: ignore[operator]
                    if tile.bias is not None:
                        tile.bias.copy_(other.bias[rows])  # type: ignore[operator]


class TiledLinearReturnBias(TiledLinear):
    """The same for layers that return (output, bias), as Megatron's do; so does this one."""

    def _reduce_local_output(self, in_id: int, out_id: int, current_out: Any, new_out: Any) -> Any:
        output, bias = new_out
        if current_out is None:
            return output, bias
        return current_out[0] + output, current_out[1] if bias is None else bias

    def _combine_output_splits(self, outputs: list[Any]) -> Any:
        biases = [bias for _, bias in outputs if bias is not None]
        return torch.cat([output for output, _ in outputs], dim=-1), torch.cat(
            biases, dim=-1
        ) if biases else None
