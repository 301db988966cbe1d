"""Orthogonalisation by Newton-Schulz iterations: the arithmetic of Muon, on whole matrices.

The quintic x -> a x + b x^3 + c x^5, with the coefficients of Jordan et al. (2024), moves every singular
value of a matrix towards 1 (into about 0.7 to 1.2 after five steps) and keeps the singular vectors.
"""

from __future__ import annotations

import math

import torch

A, B, C = 3.4445, -4.7750, 2.0315
METHODS = ("gram", "standard")
_RESTART = 2
"""Steps after which `gram` returns to the matrix itself: rounding adds up in products of half-precision
polynomials."""


def _standard(x: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        gram = x @ x.mT
        x = A * x + (B * gram + C * (gram @ gram)) @ x
    return x


def _gram(x: torch.Tensor, steps: int) -> torch.Tensor:
    """The same polynomials, evaluated on the small Gram matrix of a wide `x` and applied to `x` at the end."""
    done = 0
    for count in (min(steps, _RESTART), steps - _RESTART):
        gram, product = x @ x.mT, None
        for index in range(count):
            polynomial = B * gram + C * (gram @ gram)
            polynomial.diagonal(dim1=-2, dim2=-1).add_(A)
            product = polynomial if product is None else polynomial @ product
            if index < count - 1:
                gram = polynomial @ gram @ polynomial
        if product is not None:
            x = product @ x
        done += max(count, 0)
    assert done == steps
    return x


def orthogonalize(matrix: torch.Tensor, steps: int, method: str, dtype: torch.dtype) -> torch.Tensor:
    """(..., rows, columns): nearly orthonormal rows or columns, the smaller of the two; in `matrix`'s dtype.

    Args:
        steps: iterations.
        method: `gram` multiplies small matrices for wide or tall ones, `standard` does not; equal but for
            rounding.
        dtype: in which to iterate. The matrix is normalised before it is cast.
    """
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    x = _gram(x, steps) if method == "gram" and x.size(-1) > x.size(-2) else _standard(x, steps)
    return (x.mT if tall else x).to(matrix.dtype)


def muon_direction(
    blend: torch.Tensor, steps: int, method: str, dtype: torch.dtype, heads: int | None = None
) -> torch.Tensor:
    """Muon's update for one parameter, in its shape.

    A convolution's filters (4 dimensions) are rows of one matrix; further leading dimensions are a batch of
    matrices, and so are the `heads` of an attention projection. The result is scaled by the square root of
    rows over columns (the last two dimensions) where that is above 1.
    """
    shape = blend.shape
    rows, columns = shape[-2], shape[-1]
    if heads is not None:
        blend = blend.view(heads, rows // heads, columns)
        rows //= heads
    elif blend.ndim == 4:
        blend = blend.view(len(blend), -1)
    scale = math.sqrt(rows / columns) if rows > columns else 1.0
    return (orthogonalize(blend, steps, method, dtype) * scale).reshape(shape)
