"""Defects as they happen in ports and clusters, each injected into the reference's training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.detection.case import Case, Change, with_dropout
from benchmarks.detection.training import MIDDLE, Training
from xtrain.backends.fake.faults import damage_
from xtrain.zero.owners import owner_of

# ---------------------------------------------------------------- optimizer, schedule, clipping


def optimizer(name: str = "AdamW", **params: Any) -> Change:
    """Other options of the optimizer."""

    def change(t: Training) -> None:
        t.config["optimizer"]["type"] = name
        t.config["optimizer"]["params"].update(params)

    return change


def decay_vectors(t: Training) -> None:
    """Weight decay reaches biases and norms."""
    t.vector_decay = t.decay


def no_clipping_on_rank_1(t: Training) -> None:
    """Every rank updates its slices; rank 1's are not clipped."""

    def change(engine: Any) -> None:
        if t.rank == 1:
            engine.optimizer.clip_grad = 0.0

    t.engine_made.append(change)


def late_schedule(t: Training) -> None:
    """The schedule's first step is left out."""

    def change(engine: Any) -> None:
        advance, calls = engine.lr_scheduler.step, []

        def step(*args: Any, **kwargs: Any) -> None:
            calls.append(1)
            if len(calls) > 1:
                advance(*args, **kwargs)

        engine.lr_scheduler.step = step

    t.engine_made.append(change)


def rounded_weights(name: str) -> Change:
    """A weight is kept in bfloat16, without a float32 master."""

    def change(t: Training) -> None:
        def round_it(_: int) -> None:
            data = t.engine.module.get_parameter(name).data
            data.copy_(data.bfloat16())

        t.after_update.append(round_it)

    return change


# ---------------------------------------------------------------- gradients and ranks


def on_gradient(name: str, make: Callable[[Training], Callable[[torch.Tensor], torch.Tensor]]) -> Change:
    """What `make` returns rewrites the gradients of one parameter as they arrive."""

    def change(t: Training) -> None:
        t.engine_made.append(lambda engine: engine.module.get_parameter(name).register_hook(make(t)))

    return change


def not_reduced(t: Training) -> Callable[[torch.Tensor], torch.Tensor]:
    """Everybody gets rank 0's gradient instead of the mean."""
    return lambda grad: grad * (2.0 if t.rank == 0 else 0.0)


def not_cleared(t: Training) -> Callable[[torch.Tensor], torch.Tensor]:
    """The last micro-batch's gradient is added once more."""
    last: list[torch.Tensor] = []

    def hook(grad: torch.Tensor) -> torch.Tensor:
        found = grad + last[0] if last else grad
        last[:] = [grad.clone()]
        return found

    return hook


def summed_over_ranks(t: Training) -> None:
    """The gradients' sum over ranks is not divided by their number."""

    def change(engine: Any) -> None:
        for gradients in engine.optimizer.gradients:
            gradients.mean_factor *= t.ranks

    t.engine_made.append(change)


def loss_over_wrong_world(t: Training) -> None:
    """The script divides its loss by the number of ranks, as the engine does."""
    t.loss = lambda **batch: t.engine(**batch) / t.ranks


def larger_micro_batch(t: Training) -> None:
    """Two samples at a time: the model's loss is a mean over tokens, so that they weigh otherwise."""
    t.micro = 2


def inexact_norm(t: Training) -> None:
    """Gradients are clipped by a norm that is off by 1e-4, as clip_grad_norm_ of PyTorch 2.13 on the host is here."""

    def change(engine: Any) -> None:
        exact = engine.optimizer._compute_norm
        engine.optimizer._compute_norm = lambda *args: exact(*args) * (1 - 1e-4)

    t.engine_made.append(change)


def last_micro_batch_lost(t: Training) -> None:
    """The last micro-batch of a step brings no gradient."""
    calls = []

    def loss(**batch: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        found = t.engine(**batch)
        return found if len(calls) % t.accumulation else found.detach() + 0.0 * found

    t.loss = loss


def frozen(name: str) -> Change:
    """A parameter is frozen by mistake."""

    def change(model: nn.Module) -> None:
        model.get_parameter(name).requires_grad_(False)

    return lambda t: t.model_made.append(change)


def stale_after_gather(name: str) -> Change:
    """At one step a rank that does not own a weight keeps the old one."""

    def change(t: Training) -> None:
        kept: list[torch.Tensor] = []

        def before(step: int) -> None:
            if step == MIDDLE:
                kept.append(t.engine.module.get_parameter(name).data.clone())

        def after(step: int) -> None:
            if step != MIDDLE:
                return
            param = t.engine.module.get_parameter(name)
            owner = owner_of(param)
            assert owner is not None
            if owner.group.master_of(owner.member) is None:
                param.data.copy_(kept[0])

        t.before_update.append(before)
        t.after_update.append(after)

    return change


def flipped_in_largest(name: str, bit: int) -> Change:
    """In the middle a bit of the largest element of one rank's gradient flips."""

    def make(t: Training) -> Callable[[torch.Tensor], torch.Tensor]:
        done: list[int] = []

        def hook(grad: torch.Tensor) -> torch.Tensor:
            if t.rank != 1 or t.step != MIDDLE or done:
                return grad
            done.append(t.step)
            found = grad.clone()
            damage_(found, int(grad.abs().argmax()), bit)
            return found

        return hook

    return on_gradient(name, make)


def fault(**keys: Any) -> Change:
    """One of the fake backend's, in the middle."""
    return lambda t: t.section(backend="fake", fake={"faults": [{"step": MIDDLE, "rank": 1, **keys}]})


# ---------------------------------------------------------------- data, restarts


def same_data_everywhere(t: Training) -> None:
    """Rank 1 reads rank 0's samples."""
    t.batch = lambda step, slot: t.read(step, slot % t.accumulation)


def repeated_batch(t: Training) -> None:
    """One step has the batch of the step before."""
    t.batch = lambda step, slot: t.read(step - (step == MIDDLE), slot)


def shorter_context(t: Training) -> None:
    """The last token of part A does not see what follows it, and is not seen by those before."""

    def batch(step: int, slot: int) -> dict[str, torch.Tensor]:
        found = t.read(step, slot)
        found["context_lengths"] = found["context_lengths"] - 1
        return found

    t.batch = batch


def restarted(**options: Any) -> Change:
    """Started anew in the middle, with options of load_checkpoint."""

    def change(t: Training) -> None:
        t.restart, t.load_options = True, options

    return change


def data_one_behind(t: Training) -> None:
    """After a restart the data go on one step too early."""
    t.restart = True
    t.batch = lambda step, slot: t.read(step - t.restarted, slot)


# ---------------------------------------------------------------- modules


def in_module(name: str, alter: Callable[[Any], None]) -> Change:
    """Change one module of the model."""
    return lambda t: t.model_made.append(lambda model: alter(model.get_submodule(name)))


def in_dtype(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """A module computes in another dtype."""

    def alter(module: nn.Module) -> None:
        forward = module.forward

        def lower(*args: Any) -> torch.Tensor:
            with torch.autocast("cpu", dtype=dtype):
                found: torch.Tensor = forward(*args)
            return found.float()

        module.forward = lower

    return alter


def tanh_gelu(mlp: Any) -> None:
    """The gate is approximated."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        value, gate = mlp.dense_in(x).chunk(2, dim=-1)
        found: torch.Tensor = mlp.dense_out(value * F.gelu(gate, approximate="tanh"))
        return found

    mlp.forward = forward


def norm_epsilon(norm: nn.LayerNorm) -> None:
    """The epsilon of another framework."""
    norm.eps = 1e-6


def other_seed(linear: nn.Linear) -> None:
    """One module is initialised from another seed."""
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        std = float(linear.weight.std())
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * std)


def no_dropout(name: str) -> Change:
    """Dropout is forgotten in one place."""

    def change(t: Training) -> None:
        with_dropout(t)
        t.model_made.append(lambda model: setattr(model.get_submodule(name), "p", 0.0))

    return change


def masks_by_rank(t: Training) -> None:
    """Dropout masks depend on the rank where they should depend on the slot alone."""

    def change(engine: Any) -> None:
        place = engine._random.place
        engine._random.place = lambda: (place()[0], place()[1] + 100 * t.rank)

    with_dropout(t)
    t.engine_made.append(change)


QKV, DENSE_IN, DENSE_OUT = "attention.query_key_value", "mlp.dense_in", "mlp.dense_out"

DEFECTS = (
    Case("Adam's epsilon is 1e-6 instead of 1e-8", optimizer(eps=1e-6)),
    Case("Adam's beta2 is 0.959 instead of 0.95", optimizer(betas=[0.9, 0.959])),
    Case("Adam without bias correction", optimizer(bias_correction=False)),
    Case("L2 regularisation instead of decoupled weight decay", optimizer("Adam", adam_w_mode=False)),
    Case("weight decay on biases and norms", decay_vectors),
    Case("no clipping on rank 1", no_clipping_on_rank_1),
    Case("the norm that is clipped by is off by 1e-4", inexact_norm),
    Case("the schedule is one step late", late_schedule),
    Case(
        "a weight is kept in bf16, without a master",
        rounded_weights(f"layers.2.{DENSE_OUT}.weight"),
        module=f"layers.2.{DENSE_OUT}",
    ),
    Case(
        "one gradient is rank 0's, not the mean",
        on_gradient(f"layers.1.{QKV}.weight", not_reduced),
        module=f"layers.1.{QKV}",
    ),
    Case(
        "one gradient is not cleared between micro-batches",
        on_gradient(f"layers.0.{DENSE_IN}.weight", not_cleared),
        module=f"layers.0.{DENSE_IN}",
    ),
    Case("gradients are summed over ranks, not averaged", summed_over_ranks),
    Case("the loss is divided by the world size twice", loss_over_wrong_world),
    Case("the last micro-batch brings no gradient", last_micro_batch_lost),
    Case("the loss is a mean over the tokens of two samples at a time", larger_micro_batch),
    Case(
        "a weight is frozen by mistake",
        frozen(f"layers.2.{DENSE_OUT}.weight"),
        module=f"layers.2.{DENSE_OUT}",
    ),
    Case(
        f"stale weight after the gather of step {MIDDLE}",
        stale_after_gather(f"layers.1.{DENSE_IN}.weight"),
        module=f"layers.1.{DENSE_IN}",
    ),
    Case(
        f"an exponent bit flips in a gradient, step {MIDDLE}",
        fault(kind="bit_flip", target="gradient", name=f"layers.0.{QKV}.weight", element=777, bit=30),
        module=f"layers.0.{QKV}",
    ),
    Case(
        f"the highest mantissa bit flips in a gradient's largest element, step {MIDDLE}",
        flipped_in_largest("layers.2.mlp_norm.bias", 22),
        module="layers.2.mlp_norm",
    ),
    Case(
        f"an exponent bit flips in a weight of rank 1, step {MIDDLE}",
        fault(kind="bit_flip", target="parameter", name="layers.1.mlp_norm.weight", element=3, bit=25),
        module="layers.1.mlp_norm",
    ),
    Case(
        f"an exponent bit flips in an activation, step {MIDDLE}",
        fault(kind="bit_flip", target="activation", name="layers.1.attention_norm", element=10, bit=25),
        module="layers.1.attention_norm",
    ),
    Case("both ranks read the same samples", same_data_everywhere),
    Case(f"step {MIDDLE} has the batch of step {MIDDLE - 1}", repeated_batch),
    Case("the last token of the context is masked causally", shorter_context),
    Case(f"restart after step {MIDDLE} without optimizer state", restarted(load_optimizer_states=False)),
    Case(f"restart after step {MIDDLE} without the schedule", restarted(load_lr_scheduler_states=False)),
    Case(f"restart after step {MIDDLE} with data one step behind", data_one_behind),
    Case("one module in fp16", in_module("layers.1.mlp", in_dtype(torch.float16)), module="layers.1.mlp*"),
    Case(
        "one module in bf16",
        in_module("layers.2.attention", in_dtype(torch.bfloat16)),
        module="layers.2.attention*",
    ),
    Case("GELU by tanh in one module", in_module("layers.0.mlp", tanh_gelu), module=f"layers.0.{DENSE_OUT}"),
    Case(
        "LayerNorm's epsilon is 1e-6 in one module",
        in_module("layers.0.attention_norm", norm_epsilon),
        module="layers.0.attention_norm",
    ),
    Case(
        "one module is initialised from another seed",
        in_module(f"layers.2.{QKV}", other_seed),
        module=f"layers.2.{QKV}",
    ),
    Case(
        "dropout masks depend on the rank",
        masks_by_rank,
        reference="dropout",
        module="layers.0.attention.dropout",
    ),
    Case(
        "no dropout in one place",
        no_dropout("layers.1.dropout"),
        reference="dropout",
        module="layers.1.dropout",
    ),
)
