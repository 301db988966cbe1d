"""DeepSpeed's Muon classes (`deepspeed.runtime.zero.muon`), as xtrain's one Muon."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from xtrain.base.errors import NotImplementedYetError
from xtrain.optim import muon

__all__ = ["Muon", "MuonWithAuxAdam", "SingleDeviceMuon", "SingleDeviceMuonWithAuxAdam"]


class MuonWithAuxAdam(muon.Muon):
    """`MuonWithAuxAdam`: groups with `use_muon`; Adam for those without it.

    Raises:
        NotImplementedYetError: an `adam_optimizer` of the script's own.
    """

    def __init__(
        self,
        param_groups: Iterable[dict[str, Any]],
        adam_optimizer: Any = None,
        adam_optimizer_kwargs: dict[str, Any] | None = None,
        adam_w_mode: bool = True,
        fallback_to_inline: bool = False,
    ) -> None:
        if adam_optimizer is not None or adam_optimizer_kwargs:
            raise NotImplementedYetError(
                "MuonWithAuxAdam(adam_optimizer=...)", "leave it out: the groups without use_muon get AdamW"
            )
        super().__init__(param_groups, adam_w_mode)


class Muon(muon.Muon):
    """`Muon`: matrices only."""

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        ns_method: str = "gram",
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_method": ns_method}
        super().__init__([{"params": list(params), "use_muon": True, **options}])


SingleDeviceMuon = Muon
SingleDeviceMuonWithAuxAdam = MuonWithAuxAdam
