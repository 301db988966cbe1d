"""`zero.Init`: building a model of which no rank ever holds more than a module's own parameters whole.

A module's parameters are divided when the module becomes part of another one, or when the context ends:
its constructor has run by then. What code inside the context does to divided parameters afterwards
(`self.apply(init)`, `self.layer.weight.data.normal_()`) makes them whole first and divides them again.
"""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

from xtrain import comm
from xtrain.base.errors import BackendError, ConfigError, NotImplementedYetError
from xtrain.config import load_config
from xtrain.config.backend import choose_backend
from xtrain.parallel import grid_from_mpu
from xtrain.precision import for_backend, make_policy
from xtrain.zero import foreign
from xtrain.zero.gathered import GatheredParameters
from xtrain.zero.home import LooseShard, home_of

_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


_SHAPE: dict[Any, Callable[[torch.Size], Any]] = {
    torch.Tensor.dim: len,
    torch.Tensor.ndimension: len,
    torch.Tensor.ndim.__get__: len,  # type: ignore[attr-defined]
    torch.Tensor.shape.__get__: lambda shape: shape,  # type: ignore[attr-defined]
    torch.Tensor.size: lambda shape: shape,
    torch.Tensor.numel: lambda shape: shape.numel(),
    torch.Tensor.nelement: lambda shape: shape.numel(),
}
"""What a divided parameter answers for itself. torch.nn.init asks before it writes, and leaves an empty tensor
as it is."""

_VIEWS = frozenset(
    {"view", "view_as", "reshape", "flatten", "t", "transpose", "clone", "__getitem__", "__setitem__"}
)


class _Touches(TorchFunctionMode):
    """Makes divided parameters whole that construction code changes in place, or whose `.data` or views it takes;
    answers for their shapes."""

    def __init__(self, touched: Callable[[nn.Parameter, LooseShard], None]) -> None:
        super().__init__()
        self._touched = touched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        param = args[0] if args else kwargs.get("tensor")  # torch.nn.init calls by name
        home = home_of(param) if isinstance(param, nn.Parameter) else None
        if isinstance(home, LooseShard) and not home.held:
            if func in _SHAPE:
                answer = _SHAPE[func](home.shape)
                which = args[1:] or tuple(kwargs.values())
                return answer[which[0]] if func is torch.Tensor.size and which else answer
            name = getattr(func, "__name__", "")
            in_place = name.endswith("_") and not name.startswith("__")
            if in_place or func == _DATA or name in _VIEWS:
                self._touched(param, home)
        return func(*args, **kwargs)


def single_rank_contradiction(
    ranks: int, given: Any, environment: Mapping[str, str | None] | None = None
) -> str | None:
    """Why parameters must not be divided over one rank: the launcher has started several. None where all is well.

    Args:
        ranks: to divide over.
        given: the process group that the script has given, which may have one rank on purpose.
        environment: None: this process's.
    """
    told = (os.environ if environment is None else environment).get("WORLD_SIZE") or ""
    if ranks != 1 or given is not None or not told.isdecimal() or int(told) < 2:
        return None
    return (
        f"zero.Init would keep the whole model on each of the WORLD_SIZE={told} ranks that were launched: "
        "torch.distributed was initialised with one rank before; call init_distributed() first of all, or pass "
        "data_parallel_group if a group of one rank is meant"
    )


class Init:
    """Context in which modules are built divided over the data-parallel ranks; `deepspeed.zero.Init`.

    All ranks must build the same model. Values are the first rank's.

    Args:
        module: divide this model's parameters at once; no context is needed then.
        data_parallel_group: ranks to divide over; None: those of `mpu`, or all.
        sequence_data_parallel_group: the same with sequence parallelism.
        remote_device: not there yet, except None, "none" and "cpu" on backends whose memory is the host's.
        config_dict_or_path, config: the DeepSpeed configuration; decides the dtype.
        enabled: False makes it do nothing.
        dtype: of floating-point parameters; None: what the configuration says, else as built.
        mpu: the script's process grid.
        mem_efficient_linear, pin_memory: accepted; parameters saved for backward are freed in any case.

    Source: https://deepspeed.readthedocs.io/en/latest/zero3.html#deepspeed.zero.Init
    """

    _open: list[Init] = []

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's own when the config says that its engine trains."""
        call = inspect.signature(cls.__init__).bind(None, *args, **kwargs).arguments
        given = call.get("config_dict_or_path") or call.get("config")
        if cls is not Init or given is None or not call.get("enabled", True):
            return super().__new__(cls)
        checked = load_config(given)
        if checked.values.xtrain.engine == "native":
            return super().__new__(cls)
        return foreign.engine(checked.values.xtrain.engine).zero_init(checked, call)

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: dist.ProcessGroup | None = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: str | Path | dict[str, Any] | None = None,
        config: str | Path | dict[str, Any] | None = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
    ) -> None:
        for feature, asked in (
            ("zero_param_parallel_group", zero_param_parallel_group is not None),
            ("zero_quantized_weights", zero_quantized_weights),
            ("zero_quantized_nontrainable_weights", zero_quantized_nontrainable_weights),
            ("param_swapper", param_swapper is not None),
            (f"remote_device={remote_device!r}", remote_device not in (None, "none", "cpu")),
        ):
            if asked:
                raise NotImplementedYetError(f"zero.Init({feature})", "leave it out")
        self.enabled = enabled
        if not enabled:
            return
        given = config_dict_or_path if config_dict_or_path is not None else config
        checked = None if given is None else load_config(given)
        self.dtype = dtype
        self._checks = checked is not None and checked.values.zero_optimization.enable_sanity_checks
        backend = choose_backend(checked)
        if dtype is None and checked is not None:
            self.dtype = for_backend(make_policy(checked.values), checked.values, backend).module
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise ConfigError(f"zero.Init(dtype={self.dtype}) must be a floating-point dtype")
        backend.prepare(comm.get_local_rank(), checked is not None and checked.values.xtrain.aligned)
        comm.init_distributed(dist_backend=backend.collectives.process_group_backend, verbose=False)
        self.device = backend.runtime.device(comm.get_local_rank())
        if sequence_data_parallel_group is not None:
            if data_parallel_group is not None:
                raise ConfigError(
                    "zero.Init was given data_parallel_group and sequence_data_parallel_group: pass the latter alone"
                )
            data_parallel_group = sequence_data_parallel_group
        if data_parallel_group is None and mpu is not None:
            data_parallel_group = grid_from_mpu(mpu).group
        problem = single_rank_contradiction(comm.get_world_size(data_parallel_group), data_parallel_group)
        if problem is not None:
            raise BackendError(problem)
        self.process_group = data_parallel_group
        self.source = 0 if data_parallel_group is None else dist.get_global_rank(data_parallel_group, 0)
        self._built: list[weakref.ref[nn.Module]] = []
        self._whole: dict[nn.Parameter, LooseShard] = {}
        self._mode = _Touches(self._touch)
        if module is not None:
            self._divide(module)

    # ---------------------------------------------------------------- dividing

    @torch.no_grad()
    def _divide(self, module: nn.Module) -> None:
        with torch._C.DisableTorchFunction():
            self._shard_touched()
            self._materialize(module)
            for param in module.parameters():
                if home_of(param) is None:
                    as_built = self.dtype is None or not param.is_floating_point()
                    param.data = param.data.to(device=self.device, dtype=None if as_built else self.dtype)
                    LooseShard(param, self.process_group, self.source)
                    param.ds_enable_sanity_checks = self._checks  # type: ignore[attr-defined]

    def _materialize(self, module: nn.Module) -> None:
        """Give parameters on the meta device (torch.nn.utils.skip_init) memory, and zeros: no values are asked for."""
        made: dict[nn.Parameter, nn.Parameter] = {}
        for owner in module.modules():
            for name, param in owner._parameters.items():
                if param is not None and param.is_meta:
                    if param not in made:
                        data = torch.zeros_like(param, device=self.device)
                        made[param] = nn.Parameter(data, requires_grad=param.requires_grad)
                    owner._parameters[name] = made[param]

    def _touch(self, param: nn.Parameter, home: LooseShard) -> None:
        home.unshard()
        self._whole[param] = home

    def _shard_touched(self) -> None:
        touched, self._whole = self._whole, {}
        for param, home in touched.items():
            with GatheredParameters(param, modifier_rank=0):
                home.reshard()

    # ---------------------------------------------------------------- the context

    def __enter__(self) -> Init:
        if not self.enabled:
            return self
        if not Init._open:
            _patch()
        Init._open.append(self)
        self._mode.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not self.enabled:
            return
        self._mode.__exit__(kind, error, trace)
        Init._open.pop()
        if not Init._open:
            _unpatch()
        if kind is None:
            self._divide_built()

    def _divide_built(self) -> None:
        built, self._built = self._built, []
        for reference in built:
            if (module := reference()) is not None:
                self._divide(module)
        self._shard_touched()


@contextmanager
def suspended() -> Iterator[None]:
    """What is built inside belongs to no open `zero.Init`: around `initialize()`, whose engine is a module, too."""
    contexts, Init._open = Init._open, []
    for context in reversed(contexts):
        context._mode.__exit__(None, None, None)
        context._divide_built()
    if contexts:
        _unpatch()
    try:
        yield
    finally:
        if contexts:
            _patch()
        Init._open = contexts
        for context in contexts:
            context._mode.__enter__()


# What help() and editors show; __new__ would hide it.
_ARGUMENTS = list(inspect.signature(Init.__init__).parameters.values())[1:]
setattr(Init, "__signature__", inspect.Signature(_ARGUMENTS))  # noqa: B010 - types know no such attribute

_original: dict[str, Any] = {}


def _patch() -> None:
    """Let nn.Module tell the innermost open context what is built, attached and initialised."""
    for name in ("__init__", "__setattr__", "add_module", "apply"):
        _original[name] = getattr(nn.Module, name)

    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        _original["__init__"](self, *args, **kwargs)
        Init._open[-1]._built.append(weakref.ref(self))

    def setattr_(self: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            Init._open[-1]._divide(value)
        _original["__setattr__"](self, name, value)

    def add_module(self: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(module, nn.Module):
            Init._open[-1]._divide(module)
        _original["add_module"](self, name, module)

    def apply(self: nn.Module, fn: Callable[[nn.Module], None]) -> nn.Module:
        for child in self.children():
            child.apply(fn)
        with GatheredParameters(self.parameters(recurse=False), modifier_rank=0):
            fn(self)
        return self

    for name, function in zip(_original, (init, setattr_, add_module, apply), strict=True):
        setattr(nn.Module, name, function)


def _unpatch() -> None:
    for name, function in _original.items():
        setattr(nn.Module, name, function)
    _original.clear()
