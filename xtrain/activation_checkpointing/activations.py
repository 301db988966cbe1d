"""How the inputs of checkpointed functions are kept until backward: whole, in pieces, or on the host.

`ActivationStore` packs and unpacks them as torch's saved-tensor hooks. What is recomputed, and when,
is torch.utils.checkpoint's affair (see checkpointing.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from xtrain import comm
from xtrain.backends.alignment import HOST_BYTES, aligned_unit, round_up
from xtrain.base.errors import ConfigError


class ModelParallelGrid(NamedTuple):
    """The ranks that compute the same activations: their group, how many they are, which one this is."""

    group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0


class _Kept(NamedTuple):
    """A packed activation. `split`: it is one of the group's pieces, of a flat and padded tensor."""

    piece: torch.Tensor
    shape: torch.Size
    device: torch.device
    split: bool


class Arena:
    """One block of memory for the n-th activation of each checkpoint, against fragmentation.

    Args:
        rows: checkpoints in one forward pass.
        alignment_bytes: every row begins at a multiple of it, as a tensor in memory of its own does.
    """

    def __init__(self, rows: int, alignment_bytes: int = HOST_BYTES) -> None:
        self.rows = rows
        self._alignment = alignment_bytes
        self._blocks: dict[tuple[int, int, torch.dtype, torch.device], tuple[torch.Tensor, int]] = {}

    def place(self, position: int, flat: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Copy a flat tensor into the next row; returns the row.

        Raises:
            ConfigError: all rows are taken.
        """
        key = (position, flat.numel(), flat.dtype, device)
        if key not in self._blocks:
            width = round_up(flat.numel(), aligned_unit(self._alignment, flat.dtype))
            self._blocks[key] = torch.empty(self.rows, width, dtype=flat.dtype, device=device), 0
        block, used = self._blocks[key]
        if used == self.rows:
            raise ConfigError(
                f"more activations were checkpointed than number_checkpoints ({self.rows}) says: raise it, or call "
                "checkpointing.reset() after a forward pass without backward"
            )
        self._blocks[key] = block, used + 1
        return block[used, : flat.numel()].copy_(flat)

    def forget(self) -> None:
        """Start anew; rows that are in use stay with their users."""
        self._blocks.clear()


class ActivationStore:
    """Keeps inputs as the settings say.

    Args:
        grid: the model-parallel ranks, over which activations are split; size 1 keeps them whole.
        on_host: move them to host memory.
        arena: where copies are placed; None: each in memory of its own.
    """

    def __init__(self, grid: ModelParallelGrid, on_host: bool, arena: Arena | None) -> None:
        self.grid = grid
        self.on_host = on_host
        self.arena = arena
        self._position = 0
        self._whole: set[int] = set()

    @contextmanager
    def keeping(self, inputs: Sequence[Any]) -> Iterator[None]:
        """Around a checkpointed call with these inputs; what torch saves for it is kept here."""
        self._position = 0
        # Parameters stay where they are; a script marks others with `tensor.no_checkpointing = True`.
        self._whole = {
            item.data_ptr()
            for item in inputs
            if torch.is_tensor(item)
            and (isinstance(item, torch.nn.Parameter) or getattr(item, "no_checkpointing", False))
        }
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Kept:
        size, split = self.grid.size, self.grid.size > 1
        moved = self.on_host and tensor.device.type != "cpu"
        small = tensor.numel() < size
        if small or not tensor.is_floating_point() or tensor.data_ptr() in self._whole:
            return tensor
        if not (split or moved or self.arena):
            return tensor
        flat = tensor.detach().reshape(-1)
        if split:
            width = -(-flat.numel() // size)
            flat = torch.nn.functional.pad(flat, (0, width * size - flat.numel()))
            flat = flat[width * self.grid.rank :][:width]
        device = torch.device("cpu") if self.on_host else tensor.device
        if self.arena is not None:
            piece = self.arena.place(self._position, flat, device)
            self._position += 1
        else:
            piece = flat.to(device, copy=True)
        return _Kept(piece, tensor.shape, tensor.device, split)

    def _unpack(self, kept: torch.Tensor | _Kept) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        if self.arena is not None:
            self.arena.forget()  # backward has begun: the next forward pass fills new rows
        piece = kept.piece.to(kept.device)
        if not kept.split:
            return piece.view(kept.shape)
        whole = torch.empty(piece.numel() * self.grid.size, dtype=piece.dtype, device=piece.device)
        comm.all_gather_into_tensor(whole, piece, group=self.grid.group)
        return whole[: kept.shape.numel()].view(kept.shape)
