"""Process groups for layers of experts that a script writes itself, under DeepSpeed's names.

xtrain has no such layers. Scripts ask for the groups to average gradients, or to look for overflows, on their own.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from xtrain import comm
from xtrain.base.errors import ConfigError

_expert: dict[str, Any] = {}
_expert_data: dict[str, Any] = {}
_ranks: dict[str, list[int]] = {}


def _get_expert_parallel_ranks(
    world_size: int,
    tensor_parallel_size_: int,
    expert_parallel_size_: int,
    pipeline_parallel_size_: int = 1,
    use_data_before_expert_parallel_: bool = False,
) -> tuple[list[list[int]], list[list[int]]]:
    """Global ranks of all expert-parallel groups, and of all that hold the same experts.

    Each set of ranks with the same part of the model (ranks of one pipeline stage and one tensor-parallel
    position) is cut into runs of `expert_parallel_size_`, each of which has all experts; with
    `use_data_before_expert_parallel_` each takes ranks that are equally far apart.

    Raises:
        ConfigError: the sizes do not divide each other.
    """
    stage = world_size // pipeline_parallel_size_
    replicas = stage // tensor_parallel_size_
    if (
        stage * pipeline_parallel_size_ != world_size
        or replicas * tensor_parallel_size_ != stage
        or replicas % expert_parallel_size_
    ):
        raise ConfigError(
            f"{world_size} ranks cannot be divided into {pipeline_parallel_size_} pipeline stages, tensor-parallel "
            f"groups of {tensor_parallel_size_} and expert-parallel groups of {expert_parallel_size_}"
        )
    copies = replicas // expert_parallel_size_
    experts, data = [], []
    for first in range(0, world_size, stage):
        for position in range(tensor_parallel_size_):
            same = [first + position + number * tensor_parallel_size_ for number in range(replicas)]
            runs = [same[at : at + expert_parallel_size_] for at in range(0, replicas, expert_parallel_size_)]
            strided = [same[at::expert_parallel_size_] for at in range(expert_parallel_size_)]
            if use_data_before_expert_parallel_:
                runs = [same[at::copies] for at in range(copies)]
                strided = [same[at : at + copies] for at in range(0, replicas, copies)]
            experts += runs
            data += strided
    return experts, data


def _create_expert_and_data_parallel(
    expert_parallel_size_: int, use_data_before_expert_parallel_: bool = False
) -> None:
    """Make the groups for one size, once; every rank calls it."""
    name = f"ep_size_{expert_parallel_size_}"
    if name in _expert:
        return
    experts, data = _get_expert_parallel_ranks(
        comm.get_world_size(), 1, expert_parallel_size_, 1, use_data_before_expert_parallel_
    )
    for groups, into in ((experts, _expert), (data, _expert_data)):
        for ranks in groups:
            group = comm.new_group(ranks)
            if comm.get_rank() in ranks:
                into[name] = group
                if into is _expert:
                    _ranks[name] = ranks


def _of(groups: dict[str, Any], group_name: str) -> Any:
    if group_name not in groups:
        raise KeyError(
            f"no expert-parallel groups {group_name!r}: call groups._create_expert_and_data_parallel first"
        )
    return groups[group_name]


def _get_expert_parallel_group(group_name: str) -> dist.ProcessGroup:
    """This rank's group with all experts; a KeyError where it was not made."""
    group: dist.ProcessGroup = _of(_expert, group_name)
    return group


def _get_expert_data_parallel_group(group_name: str) -> dist.ProcessGroup:
    """The ranks that hold the same experts as this one."""
    group: dist.ProcessGroup = _of(_expert_data, group_name)
    return group


def _get_expert_parallel_group_dict() -> dict[str, Any]:
    """The groups with all experts, by name."""
    return _expert


def _get_expert_data_parallel_group_dict() -> dict[str, Any]:
    """The groups of the same experts, by name."""
    return _expert_data


def _get_max_expert_size_name() -> str:
    """Name of the largest."""
    if not _ranks:
        raise KeyError(
            "there are no expert-parallel groups: call groups._create_expert_and_data_parallel first"
        )
    return max(_ranks, key=lambda name: len(_ranks[name]))


def _get_max_expert_parallel_group() -> dist.ProcessGroup:
    """The largest of this rank's groups with all experts."""
    return _get_expert_parallel_group(_get_max_expert_size_name())


def _get_expert_parallel_world_size(group_name: str) -> int:
    """Ranks that share all experts."""
    return comm.get_world_size(_get_expert_parallel_group(group_name))


def _get_expert_parallel_rank(group_name: str) -> int:
    """This process's number among them."""
    return comm.get_rank(_get_expert_parallel_group(group_name))


def _get_expert_data_parallel_world_size(group_name: str) -> int:
    """Ranks with the same experts."""
    return comm.get_world_size(_get_expert_data_parallel_group(group_name))


def _get_expert_data_parallel_rank(group_name: str) -> int:
    """This process's number among them."""
    return comm.get_rank(_get_expert_data_parallel_group(group_name))
