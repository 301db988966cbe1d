"""From a model and its optimizer to flat groups, gradients and param groups, as the ZeRO stage asks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from xtrain import comm
from xtrain.backends import Backend
from xtrain.backends.alignment import aligned_unit
from xtrain.config.schema import ZeroConfig
from xtrain.parallel import DataParallelGrid
from xtrain.precision import PrecisionPolicy
from xtrain.precision.autocast import COMM_DTYPE
from xtrain.zero import names
from xtrain.zero.flat import FlatGroup, FlatOptions
from xtrain.zero.gather import Gatherer, GatherPolicy, ShardedHome
from xtrain.zero.gradients import Gradients, ShardedGradients, WholeGradients
from xtrain.zero.home import describe_partitioned, full_shape, home_of, make_ordinary
from xtrain.zero.leaf_modules import apply_leaf_modules
from xtrain.zero.model_hooks import ModelHooks
from xtrain.zero.param_group import ParamGroup, divide
from xtrain.zero.shards import ShardedGroup
from xtrain.zero.state_memory import Memory, OffloadStateTypeEnum, memory_of

Members = list[tuple[str, nn.Parameter]]


@dataclass
class Partition:
    """The training states of one engine.

    Attributes:
        gradients: one for each flat group of trained parameters.
        frozen: divided parameters that are not trained (stage 3).
        gatherer: of the param groups; None unless parameters are divided.
        state_memory: where optimizer states are kept; None: on the device.
        offloaded: kinds of states that `offload_states` has moved away.
    """

    gradients: list[Gradients] = field(default_factory=list)
    frozen: list[ShardedGroup] = field(default_factory=list)
    gatherer: Gatherer | None = None
    state_memory: Memory | None = None
    offloaded: frozenset[OffloadStateTypeEnum] = frozenset()

    @property
    def trained(self) -> list[FlatGroup]:
        """The flat groups of trained parameters."""
        return [item.group for item in self.gradients]

    @property
    def sharded(self) -> list[ShardedGroup]:
        """The flat groups whose parameters are divided."""
        return [*(group for group in self.trained if isinstance(group, ShardedGroup)), *self.frozen]


class Partitioner:
    """Cuts the states of one model.

    Args:
        module: on the device, in its training dtype.
        shard_gradients: whether a rank keeps its slices of the gradients only.
    """

    def __init__(
        self,
        module: nn.Module,
        zero: ZeroConfig,
        precision: PrecisionPolicy,
        backend: Backend,
        grid: DataParallelGrid,
        shard_gradients: bool,
    ) -> None:
        self.module = module
        self.zero = zero
        self.precision = precision
        self.backend = backend
        self.grid = grid
        self.shard_gradients = shard_gradients
        self._masters = memory_of(zero.offload_optimizer, "zero_optimization.offload_optimizer", backend)
        params = zero.offload_param if zero.stage == 3 else None
        self._shards = memory_of(params, "zero_optimization.offload_param", backend)
        self._names = {param: name for name, param in names.parameters(module)}
        self._position = {param: position for position, param in enumerate(self._names)}
        self._param_groups: list[ParamGroup] = []
        self._param_group_of: dict[nn.Parameter, int] = {}

    def run(self, optimizer: torch.optim.Optimizer | None) -> Partition:
        """Take over the parameters of the module and of the optimizer."""
        detach_former_engines(self._names)
        if self.zero.stage == 3:
            apply_leaf_modules(self.module, self.zero.leaf_module)
            self._param_groups = divide(self.module, self._to_shard())
            numbered = enumerate(self._param_groups)
            self._param_group_of = {param: number for number, found in numbered for param in found.params}
        result = Partition(state_memory=self._masters)
        for index, param_group in enumerate(optimizer.param_groups if optimizer else ()):
            for members in self._split(param_group["params"], index):
                result.gradients.append(self._gradients(members, index))
        taken = {param for group in result.trained for param in group.members}
        result.frozen = [
            self._sharded(members, -1, trainable=False)
            for members in self._split((p for p in self._param_group_of if p not in taken), -1)
        ]
        taken |= self._param_group_of.keys()
        for param in self._names:
            if param not in taken:
                make_ordinary(param)
        if self.zero.stage == 3:
            self._describe((*result.trained, *result.frozen))
        if self._param_groups:
            result.gatherer = self._gatherer(result.sharded)
        return result

    def _describe(self, groups: Iterable[FlatGroup]) -> None:
        """Give the parameters that stay whole in stage 3 the attributes that those which are divided have already."""
        for param in self._names:
            param.ds_enable_sanity_checks = self.zero.enable_sanity_checks  # type: ignore[attr-defined]
            if param not in self._param_group_of:
                describe_partitioned(param, param.shape)
                param.ds_persist = True  # type: ignore[attr-defined]
                param.ds_tensor = param.data.reshape(-1)  # type: ignore[attr-defined]
        for group in groups:
            group.show_pieces()

    def _to_shard(self) -> Collection[nn.Parameter]:
        """All parameters but small ones, up to a total, which stay whole on every rank."""
        persistent, sharded = 0, set()
        for param in self._names:
            size = full_shape(param).numel()
            small = size <= self.zero.param_persistence_threshold
            if small and persistent + size <= self.zero.model_persistence_threshold:
                persistent += size
            else:
                sharded.add(param)
        return sharded

    def _split(self, params: Iterable[nn.Parameter], index: int) -> list[Members]:
        """Parameters that can share a flat group, in the order in which gradients arrive.

        That is the reverse of registration; parameters unknown to the module come first.
        """
        result: dict[tuple[torch.dtype, bool, torch.dtype | None], Members] = defaultdict(list)
        last = len(self._position)
        numbered = sorted(
            enumerate(params),
            key=lambda item: (-self._param_group_of.get(item[1], last), -self._position.get(item[1], last)),
        )
        for position, param in numbered:
            if param.requires_grad or index < 0:
                name = self._names.get(param, f"param_groups.{index}.{position}")
                key = (param.dtype, param in self._param_group_of, self._communication(param))
                result[key].append((name, param))
        return list(result.values())

    def _communication(self, param: nn.Parameter) -> torch.dtype | None:
        """The dtype in which its gradient travels; None: the one in which it is accumulated."""
        return self.precision.communication or getattr(param, COMM_DTYPE, None)

    def _options(self, members: Members, dtype: torch.dtype) -> FlatOptions:
        partitioned = self.zero.stage >= 1
        numbers = [self._param_group_of.get(param) for _, param in members]
        sharded = numbers[0] is not None
        accumulation = self.precision.accumulation_of(dtype)
        travelling = self._communication(members[0][1]) or accumulation
        default_size = self.backend.zero.reduce_bucket_bytes // accumulation.itemsize
        return FlatOptions(
            partitions=self.grid.size if partitioned else 1,
            partition=self.grid.rank if partitioned else 0,
            # In stage 3 a bucket is all that a param group has in the flat group.
            bucket_size=2**63 if sharded else self.zero.reduce_bucket_size or default_size,
            align=aligned_unit(self.backend.zero.alignment_bytes, dtype, accumulation, travelling),
            masters=None if self._masters is None else self._masters.allocate,
            breaks={i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1]} if sharded else (),
            by_parameter=not partitioned,
            # As in DeepSpeed; aligned mode has the same masters in every stage.
            narrow_masters=not partitioned and self.precision.module is None and not self.precision.aligned,
        )

    def _sharded(self, members: Members, index: int, trainable: bool) -> ShardedGroup:
        options = self._options(members, members[0][1].dtype)
        allocate = None if self._shards is None else self._shards.allocate
        return ShardedGroup(members, index, options, trainable, self.grid.group, self.grid.source, allocate)

    def _gradients(self, members: Members, index: int) -> Gradients:
        dtype = members[0][1].dtype
        group: FlatGroup
        if members[0][1] in self._param_group_of:
            group = self._sharded(members, index, trainable=True)
        else:
            group = FlatGroup(members, index, self._options(members, dtype), self.grid.group)
        precision = self.precision
        return (ShardedGradients if self.shard_gradients else WholeGradients)(
            group,
            precision.accumulation_of(dtype),
            self.grid.group,
            self._communication(members[0][1]),
            precision.predivide if precision.predivide is not None else float(self.grid.replicas),
            precision.aligned,
            precision.average,
            self.grid.replicas,
        )

    def _gatherer(self, groups: list[ShardedGroup]) -> Gatherer:
        for group in groups:
            for bucket in group.layout.buckets:
                number = self._param_group_of[group.members[bucket.members[0]]]
                self._param_groups[number].parts.append((group, bucket))
        given = self.zero.model_fields_set
        policy = GatherPolicy(
            prefetch=self.zero.prefetch_bucket_size if "prefetch_bucket_size" in given else None,
            reuse_distance=self.zero.max_reuse_distance if "max_reuse_distance" in given else None,
            live=self.zero.max_live_parameters,
        )
        gatherer = Gatherer(self._param_groups, comm.companion(self.grid.group), policy)
        ModelHooks(self.module, gatherer)
        return gatherer


def detach_former_engines(params: Iterable[nn.Parameter]) -> None:
    """A parameter belongs to the engine that was built last."""
    for param in params:
        if isinstance(home := home_of(param), ShardedHome):
            home.gatherer.detach()
