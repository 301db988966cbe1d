"""Damage to single numbers, exact to the bit. When and where it happens is decided in xtrain.integrity."""

from __future__ import annotations

import torch

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def damage_(tensor: torch.Tensor, element: int, bit: int | None) -> tuple[float, float]:
    """Flip one bit of an element of a tensor, in place; with `bit` None the element becomes NaN.

    Args:
        tensor: floating point, of any shape and strides.
        element: its number when the tensor is flattened.
        bit: 0 is the lowest of the mantissa.

    Returns:
        (the element before, and after).
    """
    # A scalar view, whatever the strides: indices of the element in each dimension.
    place = []
    for size in reversed(tensor.shape):
        place.append(element % size)
        element //= size
    number = tensor.detach()[tuple(reversed(place))]
    before = float(number)
    if bit is None:
        number.fill_(float("nan"))
    else:
        dtype = _BITS[tensor.element_size()]
        mask = 1 << bit
        if bit == tensor.element_size() * 8 - 1:
            mask -= 1 << tensor.element_size() * 8  # the sign bit of an integer
        number.view(dtype).bitwise_xor_(mask)
    return before, float(number)
