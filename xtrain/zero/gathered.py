"""`GatheredParameters` and external parameters: what a script says about parameters of ZeRO stage 3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xtrain import comm
from xtrain.base.errors import ConfigError, TrainingError
from xtrain.zero import foreign
from xtrain.zero.gather import ShardedHome
from xtrain.zero.home import Home, home_of
from xtrain.zero.model_hooks import external_parameters
from xtrain.zero.param_group import ParamGroup


def _as_parameters(params: Any) -> list[nn.Parameter]:
    if isinstance(params, nn.Module):
        return list(params.parameters())
    if isinstance(params, torch.Tensor):
        params = [params]
    if not isinstance(params, Iterable):
        raise ConfigError(
            f"GatheredParameters() takes a parameter, a list of them or a module, not {type(params).__name__}"
        )
    found = list(params)
    for param in found:
        if not isinstance(param, torch.Tensor):
            raise ConfigError(f"GatheredParameters() was given a {type(param).__name__} among the parameters")
    return list(dict.fromkeys(found))


class GatheredParameters:
    """Makes divided parameters whole inside a `with` block, as `deepspeed.zero.GatheredParameters` does.

    Every rank must enter with the same parameters. With `modifier_rank`, that rank's changes are sent to
    all and kept, master weights included; without, changes are lost (and, with the config's
    `enable_sanity_checks`, an error: TrainingError on every rank). Ordinary tensors among the
    parameters are left alone, so that the same code works in every stage. Where a backward needs the values of
    parameters that the script itself has computed with, it belongs inside the block.

    Args:
        params: a parameter, an iterable of parameters, or a module.
        modifier_rank: rank (in the parameters' data-parallel group) whose changes are kept; None: none.
        fwd_module: the parameters are used in this module's forward: see `register_external_parameter`.
        enabled: False makes it do nothing.

    Source: https://deepspeed.readthedocs.io/en/latest/zero3.html#deepspeed.zero.GatheredParameters
    """

    def __init__(
        self,
        params: Any,
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        found = _as_parameters(params) if enabled else []
        self._homes = [(param, home) for param in found if (home := home_of(param)) is not None]
        self._theirs = foreign.Gathered(found, modifier_rank, fwd_module)
        self._modifier = modifier_rank
        self._lent: dict[nn.Parameter, torch.Tensor] = {}
        self._versions: list[tuple[nn.Parameter, int, int]] = []
        if fwd_module is not None:
            for param, _ in self._homes:
                register_external_parameter(fwd_module, param)

    def __enter__(self) -> None:
        self._theirs.__enter__()
        param_groups: dict[ParamGroup, list[ShardedHome]] = {}
        for _, home in self._homes:
            if isinstance(home, ShardedHome):
                param_groups.setdefault(home.param_group, []).append(home)
            else:
                home.unshard()
        for homes in param_groups.values():
            homes[0].gatherer.lend(homes)
            for home in homes if torch.is_grad_enabled() else ():
                home.expect_gradient()
        for param, home in self._homes:
            if isinstance(home, ShardedHome) and not home.alone[-1]:
                self._lent[param] = param.data
                if param.device.type == "cpu":
                    # `.cpu()` copies nothing here: what a script takes out must outlive the buffer, which is emptied.
                    param.data = param.data.clone()
        if self._modifier is None:
            self._versions = [
                (param, param._version, param.data_ptr())
                for param, _ in self._homes
                if getattr(param, "ds_enable_sanity_checks", False)
            ]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._modifier is not None and kind is None:
            for param, home in self._homes:
                self._keep(param, home, self._modifier)
        changed = kind is None and self._changed_anywhere()
        for param, home in self._homes:
            if (lent := self._lent.pop(param, None)) is not None:
                if self._modifier is not None and kind is None and lent.data_ptr() != param.data_ptr():
                    lent.copy_(param.data)  # for who holds it outside of this block
                param.data = lent
            home.reshard()
        self._theirs.__exit__(kind, error, trace)
        if changed:
            raise TrainingError(
                "in-place modification of gathered parameters, which is lost: GatheredParameters() needs a "
                "modifier_rank for changes to be kept (found because zero_optimization.enable_sanity_checks is set)"
            )

    def _changed_anywhere(self) -> bool:
        """Whether a parameter with `enable_sanity_checks` was changed on any rank, without a modifier rank."""
        versions, self._versions = self._versions, []
        if not versions:
            return False
        changed = any(p._version != version or p.data_ptr() != place for p, version, place in versions)
        group = self._homes[0][1].process_group
        flag = torch.tensor(float(changed), device=versions[0][0].device)
        if comm.get_world_size(group) > 1:
            comm.all_reduce(flag, comm.ReduceOp.MAX, group=group)
        return bool(flag)

    @staticmethod
    @torch.no_grad()
    def _keep(param: nn.Parameter, home: Home, modifier: int) -> None:
        data = param.data
        if data.shape != home.shape:
            raise ConfigError(
                f"a gathered parameter of shape {tuple(home.shape)} was replaced by one of shape "
                f"{tuple(data.shape)}: change its values in place"
            )
        if data.numel():
            group = home.process_group
            source = modifier if group is None else dist.get_global_rank(group, modifier)
            flat = data.contiguous()
            if comm.get_world_size(group) > 1:
                comm.broadcast(flat.reshape(-1).view(torch.uint8), source, group=group)
            home.store(flat)


@contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[Any]:
    """Gather an engine's weights once for many forward passes, as generation makes; every rank must enter.

    The hooks of stage 3 are off inside, so that ranks may make different numbers of passes.

    Args:
        model: an engine; below stage 3 nothing is done.

    Yields:
        the engine.
    """
    gatherer = model.train_state.partition.gatherer
    hooks = None if gatherer is None else gatherer.hooks
    with GatheredParameters(model.module):
        if gatherer is None or hooks is None:
            yield model
            return
        hooks.remove()
        try:
            yield model
        finally:
            hooks.put_back()
            gatherer.forget_order()


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Announce that `module`'s forward uses a parameter of another module.

    xtrain finds such uses by itself when the parameter is read as an attribute of its module; this is
    for the rest (a parameter kept in a list, say).

    Raises:
        ConfigError: the arguments are not a module and a parameter.
    """
    if not isinstance(module, nn.Module) or not isinstance(parameter, nn.Parameter):
        raise ConfigError(
            "register_external_parameter() takes a module and a parameter, not "
            f"{type(module).__name__} and {type(parameter).__name__}"
        )
    foreign.register_external(module, parameter)
    announced = external_parameters(module)
    if any(parameter is other for other in announced):
        return
    announced.append(parameter)
    parameter.is_external_param = True  # type: ignore[attr-defined]
    home = home_of(parameter)
    if isinstance(home, ShardedHome) and home.gatherer.hooks is not None:
        home.gatherer.hooks.hook(module, [home.param_group])


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Undo `register_external_parameter` for engines built from now on.

    Raises:
        ConfigError: it was not registered.
    """
    announced = external_parameters(module)
    for position, other in enumerate(announced):
        if other is parameter:
            del announced[position]
            return
    raise ConfigError("unregister_external_parameter(): the parameter is not registered with this module")
