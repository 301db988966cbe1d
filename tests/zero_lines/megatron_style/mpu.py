"""A script's own process grid and tensor-parallel layers, as Megatron's mpu: CUDA and NCCL are taken for granted."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.cuda import _lazy_call
from torch.cuda import device as device_context

_MODEL, _DATA = None, None


def initialize_model_parallel(size):
    global _MODEL, _DATA
    world = dist.get_world_size()
    assert world % size == 0
    for first in range(0, world, size):
        group = dist.new_group(list(range(first, first + size)), backend="nccl")
        if dist.get_rank() in range(first, first + size):
            _MODEL = group
    for first in range(size):
        group = dist.new_group(list(range(first, world, size)))
        if dist.get_rank() % size == first:
            _DATA = group


def get_model_parallel_group():
    return _MODEL


def get_model_parallel_rank():
    return dist.get_rank(group=_MODEL)


def get_model_parallel_world_size():
    return dist.get_world_size(group=_MODEL)


def get_model_parallel_src_rank():
    return dist.get_rank() // get_model_parallel_world_size() * get_model_parallel_world_size()


def get_data_parallel_group():
    return _DATA


def get_data_parallel_rank():
    return dist.get_rank(group=_DATA)


def get_data_parallel_world_size():
    return dist.get_world_size(group=_DATA)


def _set_cuda_rng_state(state, device=-1):
    device = torch.device("cuda") if device == -1 else torch.device("cuda", device)

    def call():
        index = torch.cuda.current_device() if device.index is None else device.index
        with device_context(index):
            torch.cuda.default_generators[index].set_state(state)

    _lazy_call(call)


class CudaRNGStatesTracker:
    """Named states of the CUDA generator."""

    def __init__(self):
        self.states = {}

    def add(self, name, seed):
        before = torch.cuda.get_rng_state()
        torch.cuda.manual_seed(seed)
        self.states[name] = torch.cuda.get_rng_state()
        _set_cuda_rng_state(before)

    @contextlib.contextmanager
    def fork(self, name="model-parallel-rng"):
        before = torch.cuda.get_rng_state()
        _set_cuda_rng_state(self.states[name])
        try:
            yield
        finally:
            self.states[name] = torch.cuda.get_rng_state()
            _set_cuda_rng_state(before)


_TRACKER = CudaRNGStatesTracker()


def get_cuda_rng_tracker():
    return _TRACKER


def model_parallel_cuda_manual_seed(seed):
    torch.cuda.manual_seed(seed)
    _TRACKER.add("model-parallel-rng", seed + 2718 + get_model_parallel_rank())


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=_MODEL)
        return grad


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        dist.all_reduce(x, group=_MODEL)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def _shard(rows, columns, dim, std):
    """This rank's part of one matrix that all ranks draw alike on the CPU, so that its size does not change it."""
    master = torch.empty(rows, columns, dtype=torch.float32, requires_grad=False)
    nn.init.normal_(master, std=std)
    part = master.chunk(get_model_parallel_world_size(), dim)[get_model_parallel_rank()]
    weight = nn.Parameter(torch.empty(*part.shape, device=torch.cuda.current_device(), dtype=torch.float32))
    with torch.no_grad():
        weight.copy_(part)
    weight.model_parallel = True
    return weight


class ColumnParallelLinear(nn.Module):
    def __init__(self, columns, rows, std=0.02):
        super().__init__()
        self.weight = _shard(rows, columns, 0, std)
        size = rows // get_model_parallel_world_size()
        self.bias = nn.Parameter(torch.zeros(size, device=torch.cuda.current_device()))
        self.bias.model_parallel = True

    def forward(self, x):
        return nn.functional.linear(_Copy.apply(x), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    def __init__(self, columns, rows, std=0.02):
        super().__init__()
        self.weight = _shard(rows, columns, 1, std)
        self.bias = nn.Parameter(torch.zeros(rows, device="cuda"))

    def forward(self, x):
        return _Reduce.apply(nn.functional.linear(x, self.weight)) + self.bias
