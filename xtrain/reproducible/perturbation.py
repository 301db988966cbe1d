"""One-ulp perturbations of initial weights, for the reruns that an envelope is measured from.

`xtrain align envelope --runs K -- COMMAND` sets XTRAIN_PERTURB=SEED, or SEED:SIZE; xtrain's engine obeys it when it is
built. A script without that engine calls `perturb_if_asked(model)` after it has made its model.
"""

from __future__ import annotations

import os
import zlib

import torch
from torch import nn

from xtrain.base.errors import ConfigError
from xtrain.base.log import log_dist
from xtrain.base.run_folder import PERTURB_VARIABLE


def parse(text: str) -> tuple[int, float | None]:
    """(seed, relative size; None: one ulp) from "7" or "7:0.001".

    Raises:
        ConfigError: it is neither.
    """
    seed, _, size = text.partition(":")
    try:
        found = int(seed), float(size) if size else None
    except ValueError:
        found = -1, None
    if found[0] < 0 or (found[1] is not None and not 0 < found[1] < 1):
        raise ConfigError(
            f"{PERTURB_VARIABLE}={text} is neither SEED nor SEED:SIZE, with a size between 0 and 1, such as 7:0.001"
        )
    return found


def _one_ulp(values: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    # torch has no nextafter for float16 on every device: in bits, for every dtype alike.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    away = torch.where(up, 1, -1).to(bits)  # from zero, or towards it
    moved = (values.contiguous().view(bits) + away).view(values.dtype)
    return torch.where((values == 0) | ~moved.isfinite(), values, moved)


@torch.no_grad()
def perturb(model: nn.Module, seed: int, size: float | None = None) -> None:
    """Move every weight by one unit in the last place of its dtype, or by `size` of itself, up or down.

    Directions are drawn from (seed, name of the parameter): the same on every rank. Zeros stay. Collective for
    parameters that are divided over ranks.
    """
    from xtrain.zero.home import home_of, whole

    for name, param in model.named_parameters():
        if not param.is_floating_point():
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        with whole(param) as data:
            up = (torch.rand(data.shape, generator=generator) < 0.5).to(data.device)
            moved = _one_ulp(data, up) if size is None else data * torch.where(up, 1 + size, 1 - size)
            moved = moved.to(data.dtype)
            if (home := home_of(param)) is not None:
                home.store(moved)
            data.copy_(moved)


def perturb_if_asked(model: nn.Module) -> None:
    """Perturb the model as XTRAIN_PERTURB says; nothing without it."""
    text = os.environ.get(PERTURB_VARIABLE)
    if text:
        seed, size = parse(text)
        perturb(model, seed, size)
        how = "one ulp" if size is None else f"{size:g} of itself"
        log_dist(f"{PERTURB_VARIABLE}={text}: every initial weight was moved by {how}", ranks=[0])
