"""The partitioned optimizer: clip, update the owned master slices, gather the new parameters.

Stage 0 is the same code with one partition: every rank owns everything.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from xtrain import comm
from xtrain.backends import Backend
from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.base.log import log_dist
from xtrain.optim.elementwise import updates_one_by_one
from xtrain.optim.parameterwise import ParameterwiseOptimizer
from xtrain.parallel import DataParallelGrid
from xtrain.precision import LossScale
from xtrain.zero.gradients import Gradients
from xtrain.zero.param_fragments import counted_parts, param_fragments
from xtrain.zero.reducer import GradientReducer
from xtrain.zero.state_memory import HostMemory, Memory, move_into


def _sum_of_squares(flat: torch.Tensor, dtype: torch.dtype, chunk_size: int | None) -> torch.Tensor:
    """Sum of squares of a one-dimensional tensor, accumulated in `dtype`; a scalar.

    Converting chunk by chunk is ten times faster on the host than torch's own mixed-dtype norm.
    """
    if flat.dtype == dtype or chunk_size is None:
        return torch.linalg.vector_norm(flat, dtype=dtype).square()
    parts = [torch.linalg.vector_norm(chunk.to(dtype)).square() for chunk in flat.split(chunk_size)]
    return torch.stack(parts).sum()


class ZeroOptimizer(torch.optim.Optimizer):
    """What `initialize` returns as the optimizer: the user's optimizer, working on this rank's slices.

    The wrapped optimizer's `param_groups` are kept, so learning-rate schedulers and scripts that read
    or set `param_groups[i]["lr"]` work; their `params` are replaced by master slices. In stage 0 they are the model's
    parameters, or a float32 master of each in its shape where the parameters are narrower.

    Args:
        optimizer: any torch optimizer in stage 0; above, one whose update is element-wise, or a ParameterwiseOptimizer.
        gradients: those of each flat group; it belongs to `optimizer.param_groups[group.group_index]`.
        reducer: averages them; knows whether they can be read (see owners.py).
        loss_scale: by which the loss was multiplied; learns from overflows.
        backend: decides the dtype in which the norm is summed.
        grid: the ranks that share states, and those that hold other parts of the model.
        clip: largest 2-norm of the gradients, 0 for none.
        round_norm: round the norm to float32, which removes what is left of the order of its summation.
        skip_non_finite: whether steps may be skipped because gradients are infinite or NaN; the weights are
            left alone either way, unless `apply_non_finite`.
        apply_non_finite: whether such gradients are applied.
        compute_norm: False saves the norm, for which clipping must be off.
        state_memory: where optimizer states are kept; None: where the optimizer makes them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        gradients: Sequence[Gradients],
        reducer: GradientReducer,
        loss_scale: LossScale,
        backend: Backend,
        grid: DataParallelGrid,
        clip: float,
        skip_non_finite: bool,
        round_norm: bool = False,
        compute_norm: bool = True,
        state_memory: Memory | None = None,
        apply_non_finite: bool = False,
    ) -> None:
        # The base class is for isinstance checks (torch's schedulers); groups and states are the wrapped
        # optimizer's, so its constructor, which would make new ones, is not called.
        self.optimizer = optimizer
        self.defaults = optimizer.defaults
        self.gradients = gradients
        self.groups = [item.group for item in gradients]
        self.loss_scaler = loss_scale
        self.backend = backend
        self.process_group = process_group = grid.group
        self.model_parallel = grid.model
        self.reducer = reducer
        self.clip_grad = clip
        self.skip_non_finite = skip_non_finite
        self.apply_non_finite = apply_non_finite
        self.round_norm = round_norm
        self.compute_norm = compute_norm
        self.state_memory = state_memory
        self.overflow = False
        self._told = False
        self.grad_norm: float | None = None
        self._sharded = any(group.layout.partitions > 1 for group in self.groups)
        if isinstance(optimizer, ParameterwiseOptimizer):
            held = param_fragments(self.groups, len(optimizer.param_groups))
            ranks = comm.get_world_size(process_group) if self._sharded else 1
            optimizer.attach(held, process_group, ranks, backend.precision, aligned=round_norm)
        for index, param_group in enumerate(optimizer.param_groups):
            param_group["params"] = self._optimized(index, param_group["params"])
        self._parts = [parts for group in self.groups for parts in counted_parts(group, grid.model)]
        self._adapt_states()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copy.deepcopy, copy.copy and pickling, of a scheduler that holds this, too: torch would patch the
        copy's class, and with it every optimizer of engines that are built later.

        Raises:
            ConfigError: always; says what to copy instead.
        """
        raise ConfigError(
            "an engine's optimizer cannot be copied or pickled, because its states are slices that ranks share: copy "
            "engine.optimizer.state_dict() (of a scheduler its own state_dict()), or save all with "
            "engine.save_checkpoint()"
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's groups, options included."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state, keyed by master slice."""
        return self.optimizer.state

    def _optimized(self, index: int, given: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the wrapped optimizer sees in one of its parameter groups in place of `given`: masters.

        In stage 0 they stand in the order of the parameters, and frozen parameters stay where they are.
        """
        groups = [group for group in self.groups if group.group_index == index]
        if not any(group.by_parameter for group in self.groups):
            return [master for group in groups for master in group.masters]
        masters: dict[torch.Tensor, torch.Tensor] = {}
        for group in groups:
            masters.update(zip(group.members, group.masters, strict=True))
        return [masters.get(param, param) for param in given]

    def _adapt_states(self) -> None:
        """Keep the states of parameters that are their own masters; begin anew for the others."""
        optimizer, masters = self.optimizer, dict.fromkeys(self.masters)
        for param, state in list(optimizer.state.items()):
            if param in masters:
                for name, value in state.items():
                    if torch.is_tensor(value) and value.ndim:  # made before the model went to its device
                        state[name] = value.to(param.device)
            else:
                del optimizer.state[param]
        if isinstance(optimizer, torch.optim.Adagrad):  # makes its states when it is constructed
            for group in optimizer.param_groups:
                for master in group["params"]:
                    if master in masters and master not in optimizer.state:
                        start = group["initial_accumulator_value"]
                        optimizer.state[master] = {
                            "step": torch.tensor(0.0),
                            "sum": torch.full_like(master, start),
                        }

    @property
    def averaged_gradients(self) -> dict[int, list[torch.Tensor]]:
        """Parameter group -> this rank's part of each parameter's averaged gradient, one-dimensional views.

        Between the last backward of a window and the step; empty otherwise. Collective. DeepSpeed's name.
        """
        if not self.reducer.settle():
            return {}
        result: dict[int, list[torch.Tensor]] = {}
        for item in self.gradients:
            for member in range(len(item.group.members)):
                if (mine := item.piece(member)) is not None:
                    result.setdefault(item.group.group_index, []).append(mine)
        return result

    @property
    def _global_grad_norm(self) -> float | None:
        """DeepSpeed's private name of `grad_norm`, which scripts log."""
        return self.grad_norm

    @property
    def masters(self) -> list[torch.nn.Parameter]:
        """The master slices that this rank owns, in the order of the wrapped optimizer's groups and buckets."""
        return [master for group in self.groups for master in group.masters]

    @property
    def loss_scale(self) -> float:
        """Factor by which the loss of the next backward is multiplied; 1 for fp32 and bf16."""
        return self.loss_scaler.value

    cur_scale = loss_scale

    def needs_scaler(self) -> bool:
        """Whether a backward pass must start from a loss times `loss_scale`."""
        return self.loss_scaler.needed

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale adapts to overflows."""
        return self.loss_scaler.dynamic

    @property
    def _unscale(self) -> float:
        """Undoes the loss scale."""
        return 1.0 / self.loss_scale

    def _slices(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """(master, its gradient) of everything this rank owns."""
        for item in self.gradients:
            yield from zip(item.group.masters, item.of_masters(), strict=True)

    def _slices_by_group(self) -> Iterator[tuple[int, torch.nn.Parameter, torch.Tensor]]:
        """`_slices` with the number of the parameter group first."""
        numbers = [item.group.group_index for item in self.gradients for _ in item.group.masters]
        for number, (master, grad) in zip(numbers, self._slices(), strict=True):
            yield number, master, grad

    def _compute_norm(self, slices: Iterable[torch.Tensor | None], unscale: float) -> float:
        """2-norm of what all ranks hold in `slices`, times `unscale`; equal on every rank.

        What is whole on several model-parallel ranks counts once; on the others it is looked at only for whether
        it is finite, which zero times infinity carries into the sum.
        """
        dtype = self.backend.precision.norm_dtype
        chunk = self.backend.zero.update_chunk
        squares = []
        for flat, parts in zip(slices, self._parts, strict=True):
            for start, stop, counts in parts if flat is not None else ():
                assert flat is not None
                square = _sum_of_squares(flat.view(-1)[start:stop], dtype, chunk)
                squares.append(square if counts else square * 0.0)
        if not squares:
            return 0.0
        total = torch.stack(squares).sum().to(self.groups[0].device)  # masters may be offloaded
        self._over_ranks(total, comm.ReduceOp.SUM)
        norm = math.sqrt(total.item()) * unscale
        return torch.tensor(norm, dtype=torch.float32).item() if self.round_norm else norm

    def _over_ranks(self, value: torch.Tensor, op: Any, sharded: bool | None = None) -> None:
        """Reduce a number over the ranks that share states (if they divide them) and hold other parts of the model."""
        if self._sharded if sharded is None else sharded:
            comm.all_reduce(value, op, group=self.process_group)
        if self.model_parallel.size > 1:
            comm.all_reduce(value, op, group=self.model_parallel.group)

    def _all_finite(self) -> bool:
        """Whether every gradient on every rank is finite."""
        flags = [grad.isfinite().all() for _, grad in self._slices()]
        finite = torch.stack(flags).all().float() if flags else torch.ones(())
        finite = finite.to(self.groups[0].device) if self.groups else finite
        self._over_ranks(finite, comm.ReduceOp.MIN)
        return bool(finite)

    def _saturated(self) -> bool:
        """Whether the device of any rank counts an overflow since the last step."""
        flag = torch.tensor(float(self.backend.precision.take_overflow()), device=self.groups[0].device)
        self._over_ranks(flag, comm.ReduceOp.MAX, sharded=comm.get_world_size(self.process_group) > 1)
        return bool(flag)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters from the reduced gradients; clears the gradients.

        `engine.step()` calls it. So may a script, which then decides itself where a window ends; the engine's
        counters and schedule stay as they are.
        """
        if self.reducer.ran_backward:
            self.reducer.reduce_for_step()
        for group in self.groups:
            group.readopt()
        if self.compute_norm:
            self.grad_norm = self._compute_norm((grad for _, grad in self._slices()), self._unscale)
            self.overflow = not (self.apply_non_finite or math.isfinite(self.grad_norm))
            if self.apply_non_finite and not math.isfinite(self.grad_norm):
                self._tell_non_finite()
        else:
            self.overflow = self.skip_non_finite and not self._all_finite()
        if self.skip_non_finite and self.backend.precision.saturates:
            self.overflow |= self._saturated()
        if not self.overflow:
            self._update()
        self._clear()
        self.loss_scaler.update(self.overflow)

    def _update(self) -> None:
        if updates_one_by_one(self.optimizer):
            factor = self._unscale * self._clip_factor()
            for index, master, grad in self._slices_by_group():
                self._hand_over(master, grad, factor)
                self.optimizer.update(master, self.param_groups[index])
                self._finish(master)
        else:
            self._hand_over_all()
            self.optimizer.step()
            for master, _ in self._slices():
                self._finish(master)
        self.publish()

    def _clip_factor(self) -> float:
        if self.clip_grad <= 0:
            return 1.0
        assert self.grad_norm is not None, "clipping needs the norm"
        if not math.isfinite(self.grad_norm):
            return 0.0  # only with apply_non_finite; what is finite is left alone, as in DeepSpeed
        return min(1.0, self.clip_grad / (self.grad_norm + 1e-6))

    def _tell_non_finite(self) -> None:
        if not self._told:
            self._told = True
            log_dist(
                f"the gradient norm is {self.grad_norm}, and the update is applied because bf16.check_grad_overflow is "
                "false: weights become NaN (told once)",
                ranks=[0],
                level=logging.WARNING,
            )

    def _hand_over_all(self) -> None:
        """Give every master its gradient, clipped: or what the optimizer makes of the gradients, clipped.

        The latter is what DeepSpeed's ZeRO does with Muon; the norm that scripts ask for is the one that was
        clipped.
        """
        optimizer = self.optimizer
        rewrites = isinstance(optimizer, ParameterwiseOptimizer) and optimizer.rewrites_gradients
        factor = self._unscale if rewrites else self._unscale * self._clip_factor()
        for master, grad in self._slices():
            self._hand_over(master, grad, factor)
        if isinstance(optimizer, ParameterwiseOptimizer) and rewrites:
            optimizer.rewrite_gradients()
            updates = [master.grad for master, _ in self._slices()]
            if self.compute_norm:
                self.grad_norm = self._compute_norm(updates, 1.0)
            if (factor := self._clip_factor()) != 1.0:
                for update in updates:
                    if update is not None:
                        update.mul_(factor)

    @staticmethod
    def _hand_over(master: torch.nn.Parameter, grad: torch.Tensor, factor: float) -> None:
        # A gradient of the master's dtype is scaled where it is; it is cleared after the step anyway.
        full = grad.to(device=master.device, dtype=master.dtype)
        master.grad = full.mul_(factor) if factor != 1.0 else full

    def _finish(self, master: torch.nn.Parameter) -> None:
        """After the update of one slice: drop the gradient, keep new states where states are kept."""
        master.grad = None
        if self.state_memory is not None:
            state = self.state[master]
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape == master.shape:
                    state[name] = move_into(self.state_memory, value)

    def unlock_memory(self) -> None:
        """Let the operating system swap out masters and states again, where the config had them locked."""
        if isinstance(self.state_memory, HostMemory):
            states = [value for state in self.state.values() for value in state.values()]
            self.state_memory.unlock([*self.masters, *filter(torch.is_tensor, states)])

    def publish(self) -> None:
        """Round the masters into the parameters and gather every rank's slices."""
        works = [work for group in self.groups for work in group.publish()]
        for work in works:
            work.wait()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not there yet: what the engine trains is divided at initialisation."""
        raise NotImplementedYetError(
            "add_param_group() after initialize()", "give every group to initialize()"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and start the window anew. Buffers stay, whatever `set_to_none` says."""
        self.reducer.discard()

    def _clear(self) -> None:
        for item in self.gradients:
            item.zero()

    def refresh_fp32_params(self) -> None:
        """Set the masters from the module's weights, after a script has changed those."""
        for group in self.groups:
            group.refresh_masters()

    def state_dict(self) -> dict[str, Any]:
        """This rank's part, in the wrapped optimizer's format, and the loss scale. Checkpoints are written by
        parameter name (see xtrain.checkpoint), not with this."""
        return {**self.optimizer.state_dict(), "loss_scale": self.loss_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned on a rank that owned the same slices."""
        state = dict(state_dict)
        if (scale := state.pop("loss_scale", None)) is not None:
            self.loss_scaler.load_state_dict(scale)
        self.optimizer.load_state_dict(state)

    def __repr__(self) -> str:
        return f"ZeroOptimizer({self.optimizer!r})"
