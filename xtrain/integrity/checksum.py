"""A 64-bit checksum of a tensor's raw bits, in integer operations that every device has."""

from __future__ import annotations

import torch

from xtrain.reproducible.aligned_random import random_words

_CHUNK = 2**16
_weights: dict[torch.device, torch.Tensor] = {}


def _odd_weights(device: torch.device) -> torch.Tensor:
    """Odd 64-bit numbers: a word that changes, changes the product by which it counts, modulo 2^64."""
    if device not in _weights:
        low, high = random_words(2 * _CHUNK, 2718281828, (7, 7, 7), device).view(2, _CHUNK)
        _weights[device] = ((high << 32) ^ low) | 1
    return _weights[device]


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The raw bits of a tensor as 64-bit integers, the last one filled up with zeros."""
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if rest := octets.numel() % 8:
        octets = torch.cat([octets, octets.new_zeros(8 - rest)])
    elif octets.storage_offset() % 8:
        octets = octets.clone()
    return octets.view(torch.int64)


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit integer that any change of a single 64-bit word of the raw bits changes; a scalar on the device.

    Each word counts with an odd factor that depends on its place, so words that are swapped show too (all but one in
    2^63 of such changes).
    """
    weights = _odd_weights(tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, chunk in enumerate(_words(tensor).split(_CHUNK)):
        total += (chunk * weights[: chunk.numel()]).sum() * weights[number % _CHUNK]
    return total
