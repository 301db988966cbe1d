"""Scaling and adding lists of tensors, with the overflow flag; and what the other operations share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

TensorLists = Sequence[Sequence[torch.Tensor]]
Number = float | torch.Tensor


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype of the arithmetic: float64 stays, all else becomes float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def together(tensor_lists: TensorLists, lists: int, name: str) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors that belong together, one of each list.

    Raises:
        RuntimeError: another number of lists, or lists or tensors of different sizes (as in apex).
    """
    if len(tensor_lists) != lists:
        raise RuntimeError(f"{name} takes {lists} lists of tensors, not {len(tensor_lists)}")
    if len({len(tensors) for tensors in tensor_lists}) != 1:
        raise RuntimeError(
            f"{name}: the lists are of different lengths: {[len(given) for given in tensor_lists]}"
        )
    for tensors in zip(*tensor_lists, strict=True):
        if len({tensor.numel() for tensor in tensors}) != 1:
            raise RuntimeError(
                f"{name}: tensors of different sizes: {[tuple(given.shape) for given in tensors]}"
            )
        yield tensors


def note(noop_flag: torch.Tensor, *checked: torch.Tensor) -> None:
    """Set the flag if one of the tensors has an element that is not finite; without waiting for the device."""
    for tensor in checked:
        noop_flag.masked_fill_(~torch.isfinite(tensor).all().to(noop_flag.device), 1)


def is_set(noop_flag: torch.Tensor) -> bool:
    """Whether the flag is set; waits for the device."""
    return bool(noop_flag.reshape(-1)[0].item())


@torch.no_grad()
def multi_tensor_scale(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: TensorLists, scale: Number
) -> None:
    """[source, target]: target = source * scale; the flag says whether a source was not finite."""
    for source, target in together(tensor_lists, 2, "multi_tensor_scale"):
        note(noop_flag, source)
        target.copy_((wide(source) * scale).view_as(target))


@torch.no_grad()
def multi_tensor_axpby(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: TensorLists,
    a: Number,
    b: Number,
    arg_to_check: int,
) -> None:
    """[x, y, out]: out = a * x + b * y; the flag looks at x (`arg_to_check` 0), y (1) or both (-1)."""
    for x, y, out in together(tensor_lists, 3, "multi_tensor_axpby"):
        if arg_to_check in (0, -1):
            note(noop_flag, x)
        if arg_to_check in (1, -1):
            note(noop_flag, y)
        out.copy_((a * wide(x) + b * wide(y)).view_as(out))


@torch.no_grad()
def update_scale_hysteresis(
    current_scale: torch.Tensor,
    growth_tracker: torch.Tensor,
    hysteresis_tracker: torch.Tensor,
    found_inf: torch.Tensor,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    hysteresis: int,
) -> torch.Tensor:
    """The next loss scale, in `current_scale`, which is returned: it shrinks at the `hysteresis`th overflow in a row.

    All tensors have one element; the trackers are integers. Waits for the device.
    """
    overflow = found_inf.item() > 0
    if overflow:
        hysteresis_tracker -= 1
        growth_tracker.zero_()
        if hysteresis_tracker.item() <= 0:
            current_scale *= backoff_factor
        return current_scale
    growth_tracker += 1
    if growth_tracker.item() == growth_interval:
        grown = current_scale * growth_factor
        current_scale.copy_(torch.where(torch.isfinite(grown), grown, current_scale))
        growth_tracker.zero_()
    hysteresis_tracker.fill_(hysteresis)
    return current_scale
