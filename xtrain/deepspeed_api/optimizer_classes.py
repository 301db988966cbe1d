"""The optimizer's class under DeepSpeed's names: what `isinstance` says, and what the states are called there.

DeepSpeed has a class for each way of keeping states, and scripts ask which one it is. Here they do the same things,
so they add names only. In stage 0 without masters DeepSpeed returns the wrapped optimizer itself: `plain` makes a
class that passes for it.
"""

from __future__ import annotations

import math
import types

import torch

from xtrain import comm
from xtrain.config import XtrainConfig
from xtrain.ops.adam import FusedAdam
from xtrain.ops.lamb import FusedLamb
from xtrain.ops.lion import FusedLion
from xtrain.optim import Adam, Lamb, Lion
from xtrain.precision import LossScale, PrecisionPolicy
from xtrain.zero.optimizer import ZeroOptimizer
from xtrain.zero.parameter_offload import ParameterOffload


def _bucket_members(optimizer: ZeroOptimizer) -> list[list[torch.nn.Parameter]]:
    return [
        [group.members[member] for member in bucket.members]
        for group in optimizer.groups
        for bucket in group.layout.buckets
    ]


class _Divided(ZeroOptimizer):
    """Stages 1 to 3."""

    @property
    def dp_process_group(self) -> torch.distributed.ProcessGroup | None:
        """The ranks over which states are divided."""
        return self.process_group or comm.get_world_group()

    @property
    def overlap_comm(self) -> bool:
        """Whether buckets are reduced while backward goes on."""
        return self.reducer.overlap

    def _in_order(self) -> list[torch.nn.Parameter]:
        """What is trained, in the order of registration: flat groups have the reverse of it."""
        return [param for group in reversed(self.groups) for param in reversed(group.members)]

    def _number_of(self) -> dict[torch.nn.Parameter, int]:
        """Its place in that order."""
        return {param: number for number, param in enumerate(self._in_order())}


class DeepSpeedZeroOptimizer(_Divided):
    """Stages 1 and 2. What DeepSpeed has for each parameter group, this has for each bucket."""

    @property
    def bit16_groups(self) -> list[list[torch.nn.Parameter]]:
        """The parameters that have a part in each master slice."""
        return _bucket_members(self)

    @property
    def bit16_groups_flat(self) -> list[torch.Tensor]:
        """The same parameters in one flat tensor each, of which they are views; padded."""
        return [
            group.params[bucket.start : bucket.stop]
            for group in self.groups
            for bucket in group.layout.buckets
        ]

    @property
    def parallel_partitioned_bit16_groups(self) -> list[list[torch.Tensor]]:
        """Each of `bit16_groups_flat` by the rank that updates it; views."""
        ranks = comm.get_world_size(self.process_group)
        return [list(flat.view(ranks, -1).unbind()) for flat in self.bit16_groups_flat]

    @property
    def single_partition_of_fp32_groups(self) -> list[torch.nn.Parameter]:
        """The master slices that this rank owns."""
        return self.masters

    @property
    def nccl_start_alignment_factor(self) -> int:
        """Elements: each rank's part of `bit16_groups_flat` starts at a multiple of it."""
        return math.gcd(*(group.align for group in self.groups))

    @property
    def accumulated_grads_in_cpu(self) -> dict[int, torch.Tensor]:
        """Number of the parameter -> this rank's part of what its gradients in this window have added up to: copies in
        host memory, one-dimensional.

        Parameters of which this rank has no part are left out; nothing is there between a step and the next backward.
        In stage 1 other ranks' gradients are not in it before the last backward of the window.
        """
        result: dict[int, torch.Tensor] = {}
        if self.reducer.ran_backward:
            number_of = self._number_of()
            for item in self.gradients:
                for member, param in enumerate(item.group.members):
                    if (mine := item.piece(member)) is not None:
                        result[number_of[param]] = mine.to("cpu", copy=True)
        return result


class DeepSpeedZeroOptimizer_Stage3(_Divided):
    """Stage 3.

    Attributes:
        parameter_offload: takes the hooks off the model and puts them on again, as libraries do that generate.
    """

    parameter_offload: ParameterOffload

    @property
    def fp32_partitioned_groups_flat(self) -> list[torch.nn.Parameter]:
        """The master slices that this rank owns."""
        return self.masters

    @property
    def fp16_groups(self) -> list[list[torch.nn.Parameter]]:
        """The parameters that have a part in each master slice."""
        return _bucket_members(self)

    @property
    def leaf_parameters(self) -> dict[torch.nn.Module, list[torch.nn.Parameter]]:
        """Modules that were marked to be gathered as one, with what is trained of them."""
        found: dict[torch.nn.Module, list[torch.nn.Parameter]] = {}
        for group in self.groups:
            for param in group.members:
                if (leaf := getattr(param, "ds_z3_leaf_module", None)) is not None:
                    found.setdefault(leaf, []).append(param)
        return found

    @property
    def grad_partitions_flat_buffer(self) -> torch.Tensor:
        """This rank's parts of all averaged gradients, one after the other: a copy."""
        return torch.cat([grad.reshape(-1) for _, grad in self._slices()])

    def get_fp32_grad_partitions(self) -> dict[int, dict[int, torch.Tensor]]:
        """Parameter group -> number in it, in DeepSpeed's order -> this rank's part of the averaged gradient, float32.

        Parameters of which this rank has no part are left out. Collective.
        """
        result: dict[int, dict[int, torch.Tensor]] = {}
        if self.reducer.settle():
            order = self._number_of()
            for item in self.gradients:
                for member, param in enumerate(item.group.members):
                    if (mine := item.piece(member)) is not None:
                        result.setdefault(item.group.group_index, {})[order[param]] = mine.float()
        return result

    def _get_norm_groups(self) -> list[torch.Tensor]:
        """The 2-norm, over all ranks, of the averaged gradients of each master slice. Collective.

        With fp16 they carry the loss scale. For scripts that clip gradients themselves; DeepSpeed's private name.
        """
        if not self.reducer.settle():
            return []
        grads = [grad for _, grad in self._slices()]
        alone = [
            [grad if number == index else None for number, grad in enumerate(grads)]
            for index in range(len(grads))
        ]
        return [torch.tensor(self._compute_norm(only, 1.0), device=self.groups[0].device) for only in alone]


class BF16_Optimizer(ZeroOptimizer):
    """Stage 1 in bf16 with gradients accumulated in float32, which DeepSpeed treats apart."""

    @property
    def fp32_groups_flat_partition(self) -> list[torch.nn.Parameter]:
        """The master slices that this rank owns."""
        return self.masters

    @property
    def fp32_groups_gradients_flat(self) -> list[torch.Tensor]:
        """The averaged gradients of the parameters that have a part in each master slice, one after the other in the
        order of registration: float32 copies, whole on every rank.

        Between the last backward of a window and the step; empty otherwise. Collective: ranks keep parts of them.
        """
        if not self.reducer.settle():
            return []
        found = []
        for item in self.gradients:
            layout = item.group.layout
            for bucket in layout.buckets:
                mine = item.owned(bucket)
                flat = mine.new_empty(bucket.stop - bucket.start)
                if layout.partitions > 1:
                    comm.all_gather_into_tensor(flat, mine.contiguous(), group=self.process_group)
                else:
                    flat.copy_(mine)
                starts = [layout.starts[member] - bucket.start for member in bucket.members]
                sizes = [layout.sizes[member] for member in bucket.members]
                parts = [flat[start : start + size] for start, size in zip(starts, sizes, strict=True)]
                found.append(torch.cat(parts[::-1]).float())
        return found


class _HalfPrecision(ZeroOptimizer):
    """Stage 0 in fp16 or bf16."""

    @property
    def loss_scale_config(self) -> LossScale:
        """The loss scale with its window and hysteresis."""
        return self.loss_scaler

    @property
    def low_precision_dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.groups[0].dtype


class FP16_Optimizer(_HalfPrecision):
    """Stage 0 in fp16 or bf16 with xtrain's own Adam."""

    @property
    def fp32_groups_flat(self) -> list[torch.nn.Parameter]:
        """The masters."""
        return self.masters


class FP16_UnfusedOptimizer(_HalfPrecision):
    """Stage 0 in fp16 or bf16 with another optimizer."""

    @property
    def fp32_groups(self) -> list[list[torch.nn.Parameter]]:
        """The masters of each parameter group."""
        return [group["params"] for group in self.param_groups]


class _Plain(ZeroOptimizer):
    """Stage 0 without masters: equal to the wrapped optimizer."""

    def __eq__(self, other: object) -> bool:
        return other is self or other is self.optimizer

    def __hash__(self) -> int:
        return hash(self.optimizer)


_UNDER_DEEPSPEEDS_NAME: dict[type, type] = {Adam: FusedAdam, Lamb: FusedLamb, Lion: FusedLion}
_MODULE = {"__module__": __name__}


def _plain(wrapped: type[torch.optim.Optimizer]) -> type[ZeroOptimizer]:
    """A class that is a ZeroOptimizer and, for `isinstance`, the wrapped optimizer's class."""
    wrapped = _UNDER_DEEPSPEEDS_NAME.get(wrapped, wrapped)
    return types.new_class(wrapped.__name__, (_Plain, wrapped), exec_body=lambda body: body.update(_MODULE))


def optimizer_class(
    optimizer: torch.optim.Optimizer, config: XtrainConfig, precision: PrecisionPolicy
) -> type[ZeroOptimizer]:
    """Which class the engine's optimizer has; `optimizer` is the one to wrap."""
    values, dtype = config.values, precision.module
    zero = values.zero_optimization
    if zero.stage == 3:
        return DeepSpeedZeroOptimizer_Stage3
    if zero.stage:
        in_float32 = values.data_types.grad_accum_dtype in ("fp32", "float32")
        offloaded = zero.offload_optimizer is not None and zero.offload_optimizer.device != "none"
        apart = zero.stage == 1 and dtype == torch.bfloat16 and in_float32 and not offloaded
        return BF16_Optimizer if apart else DeepSpeedZeroOptimizer
    if dtype is not None:
        return FP16_Optimizer if isinstance(optimizer, Adam) else FP16_UnfusedOptimizer
    return _plain(type(optimizer))
