"""`deepspeed.runtime.sparse_tensor`: some rows of a matrix, as the gradient of a sparse embedding has them."""

from __future__ import annotations

import torch

from xtrain.base.errors import ConfigError


class SparseTensor:
    """Rows of a matrix and their numbers; a number may come twice, and its rows then add up.

    Args:
        dense_tensor: a sparse COO tensor of shape (rows, columns), sparse in the rows; None: to be filled by hand.

    Attributes:
        indices: (n,) int64: numbers of the rows.
        values: (n, columns): the rows.
        dense_size: [rows, columns].
        orig_dense_tensor: what it was made of.
    """

    def __init__(self, dense_tensor: torch.Tensor | None = None) -> None:
        self.orig_dense_tensor = dense_tensor
        self.indices: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.dense_size: list[int] | None = None
        if dense_tensor is not None:
            if not dense_tensor.is_sparse:
                raise ConfigError(
                    "SparseTensor() takes a sparse tensor, as nn.Embedding(sparse=True) has for gradient"
                )
            self.is_sparse, self.dtype = True, dense_tensor.dtype
            coalesced = dense_tensor.coalesce()
            self.indices = coalesced.indices().flatten()
            self.values = coalesced.values()
            self.dense_size = list(dense_tensor.shape)

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        if self.indices is None or self.values is None or self.dense_size is None:
            raise ConfigError("the SparseTensor is empty: set its indices, values and dense_size")
        return self.indices, self.values, self.dense_size

    def to_coo_tensor(self) -> torch.Tensor:
        """As torch's sparse COO tensor, not coalesced."""
        indices, values, size = self._parts()
        return torch.sparse_coo_tensor(indices.unsqueeze(0), values, size)

    @staticmethod
    def type() -> str:
        """The name that DeepSpeed gives the class."""
        return "deepspeed.SparseTensor"

    def sparse_size(self) -> tuple[int, int]:
        """(numbers that it holds, numbers of the matrix)."""
        indices, values, size = self._parts()
        return indices.numel() + values.numel(), torch.Size(size).numel()

    def add(self, b: SparseTensor) -> None:
        """Add another one of the same size."""
        indices, values, size = self._parts()
        others = b._parts()
        if size != others[2]:
            raise ConfigError(f"SparseTensor of size {size} cannot be added to one of size {others[2]}")
        self.indices = torch.cat([indices, others[0]])
        self.values = torch.cat([values, others[1]])

    def __repr__(self) -> str:
        held, whole = self.sparse_size()
        rows = self._parts()[0].numel()
        return f"SparseTensor({rows} rows, dense_size={self.dense_size}, {whole / max(held, 1):.1f} times smaller)"


__all__ = ["SparseTensor"]
