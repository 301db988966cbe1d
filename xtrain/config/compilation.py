"""Configuration section `compile`: of DeepSpeed's own compiler, which xtrain does not have.

Part of the schema (schema.py).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from xtrain.config.rules import FeatureDict, NoEffect, NotYet, Section

_DEEPCOMPILE = NoEffect("it is only read with deepcompile")
_OLD_COMPILE = NotYet("call engine.compile(backend=...), as DeepSpeed, which has removed the key, wants too")


class CompileConfig(Section):
    """DeepSpeed's compiler, DeepCompile. engine.compile() is torch.compile here and needs no key."""

    deepcompile: Annotated[bool, NotYet("call engine.compile(), which is torch.compile")] = False
    """In DeepSpeed: let engine.compile() put the communication of ZeRO into the compiled graph."""
    compile_enabled: Annotated[bool, _OLD_COMPILE] = Field(False, alias="enabled")
    """In old versions of DeepSpeed: compile the module when the engine is made."""
    disable: Annotated[bool, NoEffect("nothing is compiled unless the script calls engine.compile()")] = False
    """In old versions of DeepSpeed: compile nothing."""
    backend: Annotated[str | None, _OLD_COMPILE] = None
    """In old versions of DeepSpeed: the backend of torch.compile."""
    kwargs: Annotated[FeatureDict, _OLD_COMPILE] = {}
    """In old versions of DeepSpeed: more arguments of torch.compile."""
    autoep_non_moe: Annotated[bool, NotYet("call engine.compile(), which compiles the module")] = False
    """In DeepSpeed: compile the parts of a model with expert parallelism that are not experts."""
    free_activation: Annotated[bool, _DEEPCOMPILE] = False
    """In DeepSpeed: free activations in the compiled graph as early as possible."""
    free_activation_threshold: Annotated[int, _DEEPCOMPILE] = 10 * 1024 * 1024
    """In DeepSpeed: bytes from which an activation is freed early."""
    offload_activation: Annotated[bool, _DEEPCOMPILE] = False
    """In DeepSpeed: move saved activations to host memory, and back before backward reads them."""
    offload_activation_pin_memory: Annotated[bool, _DEEPCOMPILE] = True
    """In DeepSpeed: use page-locked memory for that."""
    offload_opt_states: Annotated[bool, _DEEPCOMPILE] = False
    """In DeepSpeed: move optimizer states to host memory during forward and backward."""
    offload_parameters: Annotated[bool, _DEEPCOMPILE] = False
    """In DeepSpeed: move parameters to host memory while they are not needed."""
    double_buffer: Annotated[bool, _DEEPCOMPILE] = True
    """In DeepSpeed: use two buffers for reductions, so that one is filled while the other is sent."""
    symmetric_memory: Annotated[bool, _DEEPCOMPILE] = False
    """In DeepSpeed: gather through memory that the GPUs of a node share."""
    debug_log: Annotated[bool, _DEEPCOMPILE] = False
    """In DeepSpeed: write the compiled graphs to files."""
    sync_before_reduce: Annotated[bool, _DEEPCOMPILE] = False
    """In DeepSpeed: wait for the device before each reduction."""
    sync_after_reduce: Annotated[bool, _DEEPCOMPILE] = False
    """In DeepSpeed: wait for the device after each reduction."""
    sync_before_allgather: Annotated[bool, _DEEPCOMPILE] = False
    """In DeepSpeed: wait for the device before each all-gather."""
    sync_after_allgather: Annotated[bool, _DEEPCOMPILE] = False
    """In DeepSpeed: wait for the device after each all-gather."""
    keep_int_input_tensors: Annotated[bool, _DEEPCOMPILE] = True
    """In DeepSpeed: profile the graph with the real values of integer inputs."""
    keep_all_input_tensors: Annotated[bool, _DEEPCOMPILE] = False
    """In DeepSpeed: profile the graph with the real values of all inputs."""
    passes: Annotated[list[str] | None, _DEEPCOMPILE] = None
    """In DeepSpeed: names of the changes to the graph, such as z1, z3, autosp, autotp."""
