"""Inputs of checkpointed layers kept on the host until backward: `...activation_checkpointing.offload_activations`.

For models whose layers are checkpointed by `torch.utils.checkpoint(use_reentrant=False)`, as Transformers does.
Only what is marked moves; `partition_activations` and `cpu_checkpointing` of the config are xtrain.checkpointing's.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from xtrain.accelerator import get_accelerator
from xtrain.base.errors import ConfigError, TrainingError

_BufferKey = tuple[tuple[int, ...], torch.dtype, bool]
_managers = threading.local()
_patching = threading.Lock()
_patch_users = 0


@dataclass
class CheckpointActivationOffloadStats:
    """What was seen, and what became of what was marked."""

    saved_tensors_seen: int = 0
    marked_tensors: int = 0
    offloaded_tensors: int = 0
    restored_tensors: int = 0
    skipped_marked_tensors: int = 0
    kept_last_tensors: int = 0
    offloaded_bytes: int = 0
    restored_bytes: int = 0


class _Kept:
    """A marked tensor between forward and backward: on its device, or as a buffer on the host.

    It lives as long as the graph that saved it; then its buffer goes back to the pool.
    """

    def __init__(self, manager: CheckpointHiddenStatesOffload, tensor: torch.Tensor) -> None:
        self.manager, self.device, self.stride = manager, tensor.device, tensor.stride()
        self.tensor: torch.Tensor | None = tensor
        self.buffer: torch.Tensor | None = None
        self.key: _BufferKey | None = None
        self.copied: Any = None
        self.used = False

    def __del__(self) -> None:
        if self.buffer is not None and self.key is not None:
            self.manager._give_back(self.key, self.buffer, self.copied)


class CheckpointHiddenStatesOffload(saved_tensors_hooks):
    """`with CheckpointHiddenStatesOffload() as offload: loss = model(x); loss.backward()`.

    Inside, the first argument of each of Transformers' checkpointed layers is marked; a script's own layers call
    `mark(x)` before they are run. A marked tensor that torch saves is copied to the host, and back when backward
    recomputes its layer. Tensors on the host already, small ones and overlapping views stay where they are.

    Args:
        use_pin_memory: page-locked buffers, which copies need to run beside computation.
        use_streams: copy on a stream of its own, where the device has streams.
        min_offload_bytes: smaller tensors stay.
        max_fwd_stash_count: copies that may be under way before computation waits for the oldest.
        max_cpu_buffer_pool_count: buffers that are kept for the next step.
        keep_last_count: the newest marked tensors that stay: backward needs them first.

    Raises:
        ConfigError: a negative count.
        TrainingError: it is entered a second time before it is left.
    """

    def __init__(
        self,
        use_pin_memory: bool = True,
        use_streams: bool = True,
        min_offload_bytes: int = 1024,
        max_fwd_stash_count: int = 2,
        max_cpu_buffer_pool_count: int = 64,
        keep_last_count: int = 1,
    ) -> None:
        super().__init__(self._pack, self._unpack)
        counts = {
            "min_offload_bytes": min_offload_bytes,
            "max_fwd_stash_count": max_fwd_stash_count,
            "max_cpu_buffer_pool_count": max_cpu_buffer_pool_count,
            "keep_last_count": keep_last_count,
        }
        for name, value in counts.items():
            if value < 0:
                raise ConfigError(f"{name} must not be negative, and is {value}")
        self.use_pin_memory, self.min_offload_bytes = use_pin_memory, min_offload_bytes
        self.max_fwd_stash_count, self.max_cpu_buffer_pool_count = (
            max_fwd_stash_count,
            max_cpu_buffer_pool_count,
        )
        self.keep_last_count = keep_last_count
        self.stats = CheckpointActivationOffloadStats()
        # A host answers with streams that do nothing, and its copies are done when they return.
        has_streams = not get_accelerator().is_synchronized_device()
        self._side: Any = get_accelerator().Stream() if use_streams and has_streams else None
        self.use_streams = self._side is not None
        self._marks: dict[int, int] = {}
        self._newest: deque[_Kept] = deque()
        self._under_way: deque[Any] = deque()
        self._pool: dict[_BufferKey, list[tuple[torch.Tensor, Any]]] = {}
        self._pooled = 0

    # ---------------------------------------------------------------- around a step

    def mark(self, tensor: torch.Tensor) -> None:
        """Keep this tensor on the host, the next time that torch saves it."""
        self._marks[id(tensor)] = self._marks.get(id(tensor), 0) + 1
        self.stats.marked_tensors += 1

    def reset(self) -> None:
        """Forget what is marked and kept; buffers stay for the next step."""
        self._marks.clear()
        self._newest.clear()
        self._under_way.clear()

    def __enter__(self) -> CheckpointHiddenStatesOffload:  # type: ignore[override]  # torch returns None
        stack = _stack()
        if self in stack:
            raise TrainingError(
                "CheckpointHiddenStatesOffload is not re-entrant: leave it before it is entered again"
            )
        self.reset()
        super().__enter__()
        stack.append(self)
        _patch(1)
        return self

    def __exit__(self, *error: object) -> None:
        _patch(-1)
        _stack().remove(self)
        super().__exit__(*error)
        if self._side is not None:
            get_accelerator().current_stream().wait_stream(self._side)
        self.reset()

    # ---------------------------------------------------------------- what torch saves

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Kept:
        self.stats.saved_tensors_seen += 1
        marks = self._marks.pop(id(tensor), 0)
        if not marks:
            return tensor
        if marks > 1:
            self._marks[id(tensor)] = marks - 1
        if self._stays(tensor):
            self.stats.skipped_marked_tensors += 1
            return tensor
        kept = _Kept(self, tensor)
        self._newest.append(kept)
        while len(self._newest) > self.keep_last_count:
            self._offload(self._newest.popleft())
        return kept

    def _unpack(self, kept: torch.Tensor | _Kept) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        first, kept.used = not kept.used, True
        if kept.tensor is not None:
            self.stats.kept_last_tensors += first
            return kept.tensor
        assert kept.buffer is not None
        if kept.copied is not None:
            get_accelerator().current_stream().wait_event(kept.copied)
        whole = torch.empty_strided(
            kept.buffer.shape, kept.stride, dtype=kept.buffer.dtype, device=kept.device
        )
        whole.copy_(kept.buffer, non_blocking=self.use_streams)
        if self.use_streams:  # the buffer must not be filled anew before this copy has been made
            kept.copied = get_accelerator().current_stream().record_event()
        if first:
            self.stats.restored_tensors += 1
            self.stats.restored_bytes += _bytes(whole)
        return whole

    def _stays(self, tensor: torch.Tensor) -> bool:
        overlaps = any(
            stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        return tensor.device.type == "cpu" or overlaps or _bytes(tensor) < self.min_offload_bytes

    def _offload(self, kept: _Kept) -> None:
        tensor, kept.tensor = kept.tensor, None
        assert tensor is not None
        kept.buffer, kept.key = self._empty_cpu_like(tensor)
        context: AbstractContextManager[Any] = nullcontext()
        if self._side is not None:
            self._side.wait_stream(get_accelerator().current_stream())
            context = get_accelerator().stream(self._side)
        with torch.no_grad(), context:
            kept.buffer.copy_(tensor, non_blocking=self.use_streams)
            if self._side is not None:
                tensor.record_stream(self._side)
                kept.copied = self._side.record_event()
                self._under_way.append(kept.copied)
        while len(self._under_way) > self.max_fwd_stash_count:
            get_accelerator().current_stream().wait_event(self._under_way.popleft())
        self.stats.offloaded_tensors += 1
        self.stats.offloaded_bytes += _bytes(tensor)

    # ---------------------------------------------------------------- buffers on the host

    def _buffer_key(self, tensor: torch.Tensor) -> _BufferKey:
        return tuple(tensor.shape), tensor.dtype, self.use_pin_memory

    def _empty_cpu_like(self, tensor: torch.Tensor) -> tuple[torch.Tensor, _BufferKey]:
        key = self._buffer_key(tensor)
        if self._pool.get(key):
            buffer, last_use = self._pool[key].pop()
            self._pooled -= 1
            if last_use is not None:
                last_use.synchronize()
            return buffer, key
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
        return (get_accelerator().pin_memory(buffer) if self.use_pin_memory else buffer), key

    def _give_back(self, key: _BufferKey, buffer: torch.Tensor, last_use: Any) -> None:
        if self._pooled < self.max_cpu_buffer_pool_count:
            self._pool.setdefault(key, []).append((buffer, last_use))
            self._pooled += 1


def get_checkpoint_hidden_states_offloading_ctx_manager(
    use_pin_memory: bool = True,
    use_streams: bool = True,
    min_offload_bytes: int = 1024,
    max_fwd_stash_count: int = 2,
    max_cpu_buffer_pool_count: int = 64,
    keep_last_count: int = 1,
) -> CheckpointHiddenStatesOffload:
    """A `CheckpointHiddenStatesOffload` with these arguments."""
    return CheckpointHiddenStatesOffload(
        use_pin_memory,
        use_streams,
        min_offload_bytes,
        max_fwd_stash_count,
        max_cpu_buffer_pool_count,
        keep_last_count,
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _stack() -> list[CheckpointHiddenStatesOffload]:
    if not hasattr(_managers, "stack"):
        _managers.stack = []
    stack: list[CheckpointHiddenStatesOffload] = _managers.stack
    return stack


def _layer_class() -> Any:
    """Transformers' checkpointed layer; None where it is not installed, or too old to have one."""
    if importlib.util.find_spec("transformers") is None:
        return None
    return getattr(importlib.import_module("transformers"), "GradientCheckpointingLayer", None)


def _patch(change: int) -> None:
    """Mark inputs of Transformers' checkpointed layers while a manager is entered anywhere in the process."""
    global _patch_users
    layer = _layer_class()
    with _patching:
        before, _patch_users = _patch_users, _patch_users + change
        if layer is None or bool(before) == bool(_patch_users):
            return
        if before:
            del layer.__call__  # what the class inherits is seen again
            if _own_call[0] is not None:
                layer.__call__ = _own_call[0]
            return
        _own_call[0] = vars(layer).get("__call__")
        inner = layer.__call__

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            stack = _stack()
            hidden = args[0] if args else kwargs.get("hidden_states")
            if stack and self.gradient_checkpointing and self.training and torch.is_tensor(hidden):
                stack[-1].mark(hidden)
            return inner(self, *args, **kwargs)

        layer.__call__ = call


_own_call: list[Any] = [None]
"""The `__call__` that the class itself defined before it was replaced."""
