"""Defects of the held-out cases that lie in gradients, optimizer, schedule or restart; see held_out.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.detection.case import Change
from benchmarks.detection.llama import RMSNorm
from benchmarks.detection.training import Training
from xtrain.zero.owners import owner_of

Hook = Callable[[torch.Tensor], torch.Tensor]


def on_engine(alter: Callable[[Any], None]) -> Change:
    """Each engine is altered when it was made."""
    return lambda t: t.engine_made.append(alter)


def after_load(alter: Callable[[Any], None]) -> Change:
    """There is a restart in the middle, and what it has loaded is altered."""

    def change(t: Training) -> None:
        t.restart = True
        t.after_load.append(alter)

    return change


# ---------------------------------------------------------------- gradients


def norms_not_reduced(t: Training) -> None:
    """The gradients of norms stay those of the rank that updates them."""

    def hook_of(param: torch.nn.Parameter) -> Hook:
        owner = owner_of(param)
        assert owner is not None
        mine = torch.zeros(param.numel())
        mine[owner.group.own_range(owner.member)] = float(t.ranks)
        return lambda grad: grad * mine.view(grad.shape).to(grad.dtype)

    def change(engine: Any) -> None:
        for module in engine.module.modules():
            if isinstance(module, RMSNorm):
                module.weight.register_hook(hook_of(module.weight))

    t.engine_made.append(change)


def reduced_too_early(prefix: str) -> Change:
    """What rank 1's last micro-batch adds to some gradients comes after they were sent."""

    def change(t: Training) -> None:
        def hook(grad: torch.Tensor) -> torch.Tensor:
            late = t.rank == 1 and t.engine.is_gradient_accumulation_boundary()
            return grad * 0.0 if late else grad

        def made(engine: Any) -> None:
            for name, param in engine.module.named_parameters():
                if name.startswith(prefix):
                    param.register_hook(hook)

        t.engine_made.append(made)

    return change


def only_last_micro_batch(t: Training) -> None:
    """Each micro-batch clears the gradients of those before."""

    def made(engine: Any) -> None:
        for param in engine.module.parameters():
            param.register_hook(
                lambda grad: grad if engine.is_gradient_accumulation_boundary() else grad * 0.0
            )

    t.engine_made.append(made)


def narrow_sums(dtype: torch.dtype) -> Change:
    """Gradients are added up in a narrow dtype: here the sum over micro-batches and ranks is rounded to it."""

    def change(t: Training) -> None:
        def before(_: int) -> None:
            for _, grad in t.engine.optimizer._slices():
                grad.copy_(grad.to(dtype))

        t.before_update.append(before)

    return change


def divided_by_next_scale(t: Training) -> None:
    """At steps after which the loss scale doubles, the gradients are divided by the doubled one."""

    def before(_: int) -> None:
        scale = t.engine.optimizer.loss_scaler
        if scale._good > 0 and scale._good % scale.window == 0:
            for _, grad in t.engine.optimizer._slices():
                grad.mul_(0.5)

    t.before_update.append(before)


# ---------------------------------------------------------------- clipping


def _clip_scaled(engine: Any) -> None:
    optimizer = engine.optimizer
    optimizer._clip_factor = lambda: min(
        1.0, optimizer.clip_grad / (optimizer.grad_norm * optimizer.loss_scale)
    )


clipped_before_unscaling = on_engine(_clip_scaled)
"""The norm that is clipped by is that of the gradients times the loss scale."""


def _clip_own(engine: Any) -> None:
    optimizer = engine.optimizer

    def factor() -> float:
        squares = sum(float(grad.double().square().sum()) for _, grad in optimizer._slices())
        norm = math.sqrt(squares) * optimizer._unscale
        return min(1.0, optimizer.clip_grad / (norm + 1e-6))

    optimizer._clip_factor = factor


clipped_by_own_norm = on_engine(_clip_own)
"""Each rank clips its slices by their norm alone."""

# ---------------------------------------------------------------- optimizer


def _epsilon_inside(engine: Any) -> None:
    def arithmetic(
        param: torch.Tensor, grad: torch.Tensor, states: list[torch.Tensor], step: int, group: dict[str, Any]
    ) -> None:
        average, square = states
        beta1, beta2 = group["betas"]
        param.mul_(1.0 - group["lr"] * group["weight_decay"])
        average.lerp_(grad, 1.0 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        denominator = (square / (1.0 - beta2**step) + group["eps"]).sqrt()
        param.addcdiv_(average, denominator, value=-group["lr"] / (1.0 - beta1**step))

    engine.optimizer.optimizer.arithmetic = arithmetic


epsilon_inside = on_engine(_epsilon_inside)
"""Adam's epsilon is added before the root is taken."""


def without_masters(t: Training) -> None:
    """Weights are updated in bf16: what an update leaves beyond that is lost."""

    def after(_: int) -> None:
        for master in t.engine.optimizer.masters:
            master.data.copy_(master.data.bfloat16())

    t.after_update.append(after)


def _zeros_when_skipped(engine: Any) -> None:
    optimizer = engine.optimizer
    clear = optimizer._clear

    def update_with_zeros() -> None:
        if optimizer.overflow:
            for _, grad in optimizer._slices():
                grad.zero_()
            optimizer._update()
        clear()

    optimizer._clear = update_with_zeros


zeros_when_skipped = on_engine(_zeros_when_skipped)
"""A step that overflows is an update with gradients of zero, instead of none."""


def weights_of_step_before(prefix: str) -> Change:
    """The forward pass uses weights of the step before, where another rank has updated them."""

    def change(t: Training) -> None:
        before: dict[str, torch.Tensor] = {}

        def after(_: int) -> None:
            for name, param in t.engine.module.named_parameters():
                owner = owner_of(param)
                if owner is None or not name.startswith(prefix):
                    continue
                now = param.data.clone()
                if name in before:
                    late = torch.ones(param.numel(), dtype=torch.bool)
                    late[owner.group.own_range(owner.member)] = False
                    late = late.view(param.shape)
                    param.data[late] = before[name][late]
                before[name] = now

        t.after_update.append(after)

    return change


# ---------------------------------------------------------------- schedule


def scheduled_for_each_rank(t: Training) -> None:
    """The schedule goes on by as many steps as there are ranks."""

    def made(engine: Any) -> None:
        advance = engine.lr_scheduler.step

        def step(*args: Any, **kwargs: Any) -> None:
            for _ in range(t.ranks):
                advance(*args, **kwargs)

        engine.lr_scheduler.step = step

    t.engine_made.append(made)


def scheduled_when_skipped(t: Training) -> None:
    """The schedule goes on at steps that were skipped."""

    def after(_: int) -> None:
        if not t.engine.was_step_applied():
            t.engine.lr_scheduler.step()

    t.after_update.append(after)


# ---------------------------------------------------------------- restarts


def _count_anew(engine: Any) -> None:
    for state in engine.optimizer.state.values():
        state["step"] = 0


counts_anew = after_load(_count_anew)
"""After a restart Adam counts its steps, by which it corrects the bias, from 1."""


def _forget_scale(engine: Any) -> None:
    power = engine.xtrain_config.values.fp16.initial_scale_power
    engine.optimizer.loss_scaler.load_state_dict({"value": 2.0**power})


forgets_scale = after_load(_forget_scale)
"""A restart begins with the initial loss scale."""


def _round_squares(engine: Any) -> None:
    for state in engine.optimizer.state.values():
        state["exp_avg_sq"].copy_(state["exp_avg_sq"].half())


squares_in_fp16 = after_load(_round_squares)
"""A checkpoint keeps Adam's second moment in fp16."""


def masters_not_loaded(t: Training) -> None:
    """After a restart the masters are what they were before the checkpoint was loaded: the initial weights."""
    t.restart = True
    initial: list[torch.Tensor] = []
    t.engine_made.append(
        lambda engine: initial.__setitem__(slice(None), [m.data.clone() for m in engine.optimizer.masters])
    )

    def loaded(engine: Any) -> None:
        for master, value in zip(engine.optimizer.masters, initial, strict=True):
            master.data.copy_(value)

    t.after_load.append(loaded)
