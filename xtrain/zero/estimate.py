"""How much memory the model states take in xtrain's ZeRO stages: arithmetic, under DeepSpeed's names.

Parameters, gradients and Adam's states of mixed-precision training (2 + 2 + 12 bytes a parameter), as the
engine keeps them; activations are not in it. Signatures are DeepSpeed's, numbers are xtrain's:
DeepSpeed's count two bytes more a parameter, for a float32 copy of the gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

PARAMETER, GRADIENT, OPTIMIZER = 2, 2, 12
"""Bytes a parameter: bfloat16 or float16 values; master weight and two moments in float32."""
HOST = 4
"""Bytes a parameter of the float32 model that each process builds on the host before `initialize`."""


def model_state_bytes(total_params: int, stage: int, ranks: int) -> int:
    """Bytes of model states on each of `ranks` devices, without offload; what the stage divides is divided evenly.

    Stage 3 needs two param groups on top (`estimate_zero3_model_states_mem_needs` adds them).
    """
    divided = (
        (OPTIMIZER if stage >= 1 else 0) + (GRADIENT if stage >= 2 else 0) + (PARAMETER if stage >= 3 else 0)
    )
    whole = PARAMETER + GRADIENT + OPTIMIZER - divided
    return total_params * whole + -(-total_params * divided // ranks)


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """(bytes of host memory a node, bytes a device) of stage 2.

    Args:
        cpu_offload: optimizer states on the host.
        additional_buffer_factor: by which host memory is multiplied, for what else is there.
    """
    ranks = num_gpus_per_node * num_nodes
    host = HOST * total_params * num_gpus_per_node
    device = model_state_bytes(total_params, 2, ranks)
    if cpu_offload:
        moved = OPTIMIZER * total_params // ranks
        device -= moved
        host = max(host, moved * num_gpus_per_node)
    return int(host * additional_buffer_factor), device


def estimate_zero3_model_states_mem_needs(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int, int]:
    """(bytes of host memory a node, bytes a device, bytes of two param groups) of stage 3.

    Args:
        largest_layer_params: of the module with most parameters of its own; two such groups are whole at a
            time, the one in use and the one that is gathered ahead.
        cpu_offload: optimizer states on the host.
        cpu_offload_params: parameters too (only with `cpu_offload`); gradients stay on the device.
        zero_init: the model is built under `zero.Init`, so that no process has it whole.
        additional_buffer_factor: by which host memory is multiplied, for what else is there.
    """
    ranks = num_gpus_per_node * num_nodes
    groups = 2 * PARAMETER * largest_layer_params
    host = HOST * (largest_layer_params if zero_init else total_params) * num_gpus_per_node
    device = model_state_bytes(total_params, 3, ranks)
    if cpu_offload:
        moved = (OPTIMIZER + (PARAMETER if cpu_offload_params else 0)) * total_params // ranks
        device -= moved
        host = max(host, moved * num_gpus_per_node)
    return int(host * additional_buffer_factor), device + groups, groups


def count_params(model: nn.Module) -> tuple[int, int]:
    """(parameters, shared ones once; parameters of the module that has most of its own)."""
    size = {param: getattr(param, "ds_numel", param.numel()) for param in model.parameters()}
    own = [sum(size[param] for param in m.parameters(recurse=False)) for m in model.modules()]
    return sum(size.values()), max(own, default=0)


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the estimates of stage 2 for a model, with and without offload."""
    total, _ = count_params(model)
    estimate_zero2_model_states_mem_needs_all_cold(
        total, num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the estimates of stage 2 for a number of parameters, with and without offload."""
    _print_header(total_params, None, num_gpus_per_node, num_nodes)
    for offload in (True, False):
        host, device = estimate_zero2_model_states_mem_needs(
            total_params, num_gpus_per_node, num_nodes, offload, additional_buffer_factor
        )
        _print_line(host, device, {"offload_optimizer": _place(offload)})


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the estimates of stage 3 for a model, for each kind of offload, with and without zero.Init."""
    total, largest = count_params(model)
    estimate_zero3_model_states_mem_needs_all_cold(
        total, largest, num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the estimates of stage 3 for numbers of parameters, for each kind of offload."""
    _print_header(total_params, largest_layer_params, num_gpus_per_node, num_nodes)
    for offload, offload_params in ((True, True), (True, False), (False, False)):
        for zero_init in (True, False):
            host, device, _ = estimate_zero3_model_states_mem_needs(
                total_params,
                largest_layer_params,
                num_gpus_per_node,
                num_nodes,
                offload,
                offload_params,
                zero_init,
                additional_buffer_factor,
            )
            options = {
                "offload_param": _place(offload_params),
                "offload_optimizer": _place(offload),
                "zero_init": str(int(zero_init)),
            }
            _print_line(host, device, options)


def _place(offload: bool) -> str:
    return "cpu " if offload else "none"


def _print_header(total: int, largest: int | None, devices: int, nodes: int) -> None:
    layer = "" if largest is None else f", {largest // 10**6}M largest layer params"
    print(
        "Estimated memory needed for params, optim states and gradients for a:\n"
        f"HW: Setup with {nodes} node{'s' * (nodes > 1)}, {devices} GPU{'s' * (devices > 1)} per node.\n"
        f"SW: Model with {total // 10**6}M total params{layer}.\n"
        "  per CPU  |  per GPU |   Options"
    )


def _print_line(host: int, device: int, options: dict[str, str]) -> None:
    text = ", ".join(f"{key}={value}" for key, value in options.items())
    print(f"  {host / 2**30:7.2f}GB | {device / 2**30:6.2f}GB | {text}")
