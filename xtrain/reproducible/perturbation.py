"""What correct runs differ in, brought about on purpose: for the reruns that an envelope is measured from.

`xtrain align envelope --runs K -- COMMAND` sets XTRAIN_PERTURB=SEED, or SEED:SIZE; xtrain's engine obeys it when it is
built. A script without that engine calls `perturb_if_asked(model)` after it has made its model. Correct runs in float32
differ in the last bit of everything, and moving the weights once by as much is enough. In 16 bits the last bit of a
weight is as large as many defects, while products and sums round anew at every step: there the rounding is perturbed,
and the float32 masters (docs/decisions/0011).
"""

from __future__ import annotations

import os
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

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


HALF = (torch.float16, torch.bfloat16)
SHARE = 0.5
"""Of the elements of a 16-bit tensor that are rounded to a neighbour of what they would have been."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _one_ulp(values: torch.Tensor, away: torch.Tensor) -> torch.Tensor:
    """One step of the grid from zero where `away` is 1, towards it where it is -1. Zeros stay."""
    # torch has no nextafter for float16 on every device: in bits, for every dtype alike.
    bits = _BITS[values.element_size()]
    moved = (values.contiguous().view(bits) + away.to(bits)).view(values.dtype)
    return torch.where((values == 0) | ~moved.isfinite(), values, moved)


@torch.no_grad()
def perturb(model: nn.Module, seed: int, size: float | None = None) -> None:
    """Move every weight by one unit in the last place of its dtype, or by `size` of itself, up or down.

    Without a size, 16-bit weights stay: see `perturb_rounding`. Directions are drawn from (seed, name of the
    parameter): the same on every rank. Zeros stay. Collective for parameters that are divided over ranks.
    """
    from xtrain.zero import names
    from xtrain.zero.home import home_of, whole

    for name, param in names.parameters(model):
        if not param.is_floating_point() or (size is None and param.dtype in HALF):
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        with whole(param) as data:
            up = (torch.rand(data.shape, generator=generator) < 0.5).to(data.device)
            away = torch.where(up, 1, -1)
            moved = _one_ulp(data, away) if size is None else data * (1 + size * away)
            moved = moved.to(data.dtype)
            if (home := home_of(param)) is not None:
                home.store(moved)
            data.copy_(moved)


@torch.no_grad()
def perturb_masters(model: nn.Module) -> None:
    """Move the float32 masters of 16-bit weights as XTRAIN_PERTURB says, by one ulp; nothing without it.

    Directions are a function of seed and value, which needs nothing to be known of where a shard lies.
    """
    from xtrain.zero.owners import owner_of

    seed, size = asked() or (0, 0.0)
    if size is not None:
        return
    for param in model.parameters():
        owner = owner_of(param) if param.dtype in HALF else None
        master = None if owner is None else owner.master()
        if master is not None and master.dtype == torch.float32:
            mixed = (master.contiguous().view(torch.int32) ^ (seed & 0x7FFFFFFF)) * 0x45D9F3B
            master.copy_(_one_ulp(master, torch.where((mixed >> 16) % 2 == 0, 1, -1)))


class _Rounding:
    """Rounds 16-bit tensors anew: some elements go to a neighbour of what they are."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def again(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, rounded anew; itself if it is not of 16 bits."""
        if tensor.dtype not in HALF or tensor.layout != torch.strided:
            return tensor
        if tensor.device not in self._generators:
            self._generators[tensor.device] = torch.Generator(tensor.device).manual_seed(self._seed)
        # Not a draw of the model's, which aligned mode would refuse.
        with torch.no_grad(), torch._C.DisableTorchFunction():
            draws = torch.rand(tensor.shape, generator=self._generators[tensor.device], device=tensor.device)
            away = (draws < SHARE / 2).char() - (draws >= 1 - SHARE / 2).char()
            return _one_ulp(tensor.detach(), away)

    def output(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same for what a module returns, and for the gradient that comes back to it."""
        if tensor.dtype not in HALF:
            return tensor
        found = tensor + (self.again(tensor) - tensor).detach()  # exact: they are neighbours
        if found.requires_grad:
            found.register_hook(self.again)
        return found

    @torch.compiler.disable
    def hook(self, module: nn.Module, _: Any, outputs: Any) -> Any:
        """After a module's forward pass."""
        return tree_map_only(torch.Tensor, self.output, outputs) if module.training else outputs


def perturb_rounding(model: nn.Module, seed: int, replica: int | None = None) -> None:
    """From now on, round anew what is computed in 16 bits: outputs of modules without children, the gradients that come
    back to them, and the gradients of 16-bit parameters. What is in other dtypes stays.

    Args:
        model: gets hooks, for good.
        replica: number of this rank's samples among those of all ranks. Ranks that hold parts of one model must have
            the same, because they have activations in common. None: the rank.
    """
    if replica is None:
        replica = dist.get_rank() if dist.is_initialized() else 0
    rounding = _Rounding(seed * 1_000_003 + replica)
    for module in model.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(rounding.hook)
    for param in model.parameters():
        if param.requires_grad and param.dtype in HALF:
            param.register_hook(rounding.again)


def asked() -> tuple[int, float | None] | None:
    """(seed, size) of XTRAIN_PERTURB; None when it is not set."""
    text = os.environ.get(PERTURB_VARIABLE)
    return parse(text) if text else None


def perturb_if_asked(model: nn.Module, replica: int | None = None) -> None:
    """Perturb the model as XTRAIN_PERTURB says; nothing without it.

    Args:
        replica: as `perturb_rounding` takes it.
    """
    wanted = asked()
    if wanted is None:
        return
    seed, size = wanted
    perturb(model, seed, size)
    if size is None:
        perturb_rounding(model, seed, replica)
        how = "float32 weights were moved by one ulp, and what is computed in 16 bits is rounded anew"
    else:
        how = f"every initial weight was moved by {size:g} of itself"
    log_dist(f"{PERTURB_VARIABLE}={os.environ[PERTURB_VARIABLE]}: {how}", ranks=[0])
