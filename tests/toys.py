"""The toy networks that tests train: each once, by what is special about it.

Classes are at module level, so that the processes that tests run in find them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import xtrain
from xtrain.activation_checkpointing.checkpointing import get_cuda_rng_tracker

FEATURES, OUTPUTS = 7, 5
"""Width of the samples and of the targets of tests/training.py."""

WIDTH = 8
"""Of blocks and of what is put together from them."""

# ---------------------------------------------------------------- one weight


class Weight(nn.Module):
    """loss = sum(weight * x): the gradient is x."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: float) -> torch.Tensor:
        return (self.weight * x).sum()


class Offset(Weight):
    """The loss is not finite where `extra` says so; its gradient always is."""

    def forward(self, x: float, extra: float = 0.0) -> torch.Tensor:
        return super().forward(x) + extra


class KeepsItsLoss(Weight):
    """The garbage collector does not see through the graph that hangs on the attribute."""

    def forward(self, x: float) -> torch.Tensor:
        self.loss = super().forward(x)
        return self.loss


class TwoWeights(Weight):
    """loss = sum(weight * x) + sum(other * x)."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.zeros(4))

    def forward(self, x: float) -> torch.Tensor:
        return super().forward(x) + (self.other * x).sum()


class Scaled(nn.Module):
    """y = weight * x from a weight of 1, returned in the way that `wrap` makes it."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(x * self.weight)


class MayHaveWeight(nn.Module):
    """The identity, or a linear layer once somebody has given it `tied`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.tied) if hasattr(self, "tied") else x


class Many(nn.Module):
    """`count` small parameters and one that all ranks have a part of."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.small = nn.ParameterList([nn.Parameter(torch.full((8,), float(i))) for i in range(count)])
        self.large = nn.Parameter(torch.arange(10_000.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * sum(param.sum() for param in self.small) + self.large.sum()


# ---------------------------------------------------------------- two layers


class TwoLayers(nn.Module):
    """Two layers and a tanh; odd sizes, so that slices cut through parameters."""

    def __init__(self, features: int = FEATURES, hidden: int = 33, outputs: int = OUTPUTS) -> None:
        super().__init__()
        self.first = nn.Linear(features, hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class ThreeModules(nn.Module):
    """Two layers with the tanh between them as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.act = nn.Tanh()
        self.second = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.act(self.first(x)))


class WithState(TwoLayers):
    """Two layers with a buffer, and a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(3))
        self.notes: Any = ["as built"]

    def get_extra_state(self) -> Any:
        return {"notes": self.notes}

    def set_extra_state(self, state: Any) -> None:
        self.notes = state["notes"]


class WithBuffers(TwoLayers):
    """Two layers with dense buffers of every kind."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        shift = float(rank)
        values = torch.arange(12.0) + shift
        self.register_buffer("flags", values.view(3, 4) % 2 == 0)
        self.register_buffer("complex64", torch.complex(values, -values))
        self.register_buffer("complex128", torch.complex(values.double(), -values.double()))
        self.register_buffer("conjugated", torch.complex(values, values).conj())
        self.register_buffer("whole", values.to(torch.int64))
        self.register_buffer("bits", values.to(torch.uint16))
        self.register_buffer("eight", values.to(torch.float8_e4m3fn))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("scalar", torch.tensor(1.5 + shift))
        self.register_buffer("turned", values.view(3, 4).t())
        self.register_buffer("repeated", values.view(1, 12).expand(5, 12), persistent=False)
        self.register_buffer("tied", self.whole)
        self.register_buffer("absent", None)
        self.register_buffer("passing", values.clone(), persistent=False)


class MixedDtypes(TwoLayers):
    """Two layers with a bf16 layer, a frozen one and a buffer beside them, of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.frozen = nn.Linear(7, 9).to(torch.bfloat16), nn.Linear(7, 13)
        self.frozen.requires_grad_(False)
        self.register_buffer("mean", torch.zeros(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more = self.low(x.bfloat16()).sum(-1, keepdim=True) + self.frozen(x - self.mean).sum(-1, keepdim=True)
        return super().forward(x) + more


class SeveralOutputs(nn.Module):
    """Two layers with dropout and running statistics; several outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 33)
        self.norm = nn.BatchNorm1d(33)
        self.dropout = nn.Dropout(0.3)
        self.second = nn.Linear(33, OUTPUTS)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        hidden = self.dropout(torch.tanh(self.norm(self.first(x))))
        return {"out": self.second(hidden) * scale, "unused": hidden.detach(), "mean": hidden.mean()}


class Graph(nn.Module):
    """Features are sent along the edges of a graph, a buffer that may be sparse, and then through a layer."""

    def __init__(self, adjacency: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.lin = nn.Linear(FEATURES, OUTPUTS)
        self.again = nn.Module()
        self.again.register_buffer("same", self.adjacency)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = nn.functional.pad(x, (0, 1))
        matrix = self.adjacency
        mixed = (
            matrix if matrix.layout in (torch.sparse_coo, torch.sparse_csr) else matrix.to_dense()
        ) @ padded.t()
        return self.lin(mixed.t()[:, :FEATURES])


# ---------------------------------------------------------------- tied, shared, frozen and unused weights


class Tied(nn.Module):
    """Two layers with one weight; or with two, to compare with."""

    def __init__(self, width: int = 4, bias: bool = False, tied: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width, bias=bias), nn.Linear(width, width, bias=bias)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x))
        return y


class FrozenNormTied(nn.Module):
    """A frozen layer, running statistics, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.out = nn.Linear(3, 3, bias=False)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.out.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.tied(self.out(self.norm(self.frozen(x))))
        return y


class Odd(nn.Module):
    """Tied weights, an unused parameter, a frozen one, one used twice and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(7, 7)
        self.b = nn.Linear(7, 7)
        self.b.weight = self.a.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.full((7,), 0.5), requires_grad=False)
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.out = nn.Linear(7, 5)
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("scalar", torch.tensor(3, dtype=torch.int16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.a(x)) + torch.tanh(self.b(x)) * self.frozen
        return self.out(torch.tanh(self.a(x)))


class Repeated(nn.Module):
    """One layer used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(self.layer(x)))

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return self(self(x))


class SharedByCheckpoints(nn.Module):
    """One layer in two checkpointed segments."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.inputs, self.layer, self.other = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inputs(x)
        for layer in (self.layer, self.other, self.layer):
            x = checkpoint(lambda y, f=layer: torch.tanh(f(y)), x, use_reentrant=self.reentrant)
        return self.head(x)


# ---------------------------------------------------------------- blocks and stacks of them


class Block(nn.Module):
    """x + down(tanh(up(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Three blocks and a head."""

    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ByRank(nn.Module):
    """Two blocks, of which each of two ranks runs one, and a head."""

    def __init__(self, block: Callable[[], nn.Module] = Block, head: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(2)])
        self.head = head or nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[xtrain.comm.get_rank()](x))


class Heads(nn.Module):
    """A trunk and a head for each modality; which one runs is the batch's choice."""

    def __init__(self, width: int, hidden: tuple[int, int]) -> None:
        super().__init__()
        self.trunk = nn.Linear(width, width)
        self.image = nn.Sequential(nn.Linear(width, hidden[0]), nn.Linear(hidden[0], 1))
        self.text = nn.Sequential(nn.Linear(width, hidden[1]), nn.Linear(hidden[1], 1))

    def forward(self, x: torch.Tensor, heads: list[str]) -> torch.Tensor:
        x = self.trunk(x)
        return sum(getattr(self, head)(x).square().mean() for head in heads)


class DropoutBlock(nn.Module):
    """Dropout from the default and from a named state; an integer, a string, a mask and None among the arguments."""

    def __init__(self, width: int, named: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.named = nn.Linear(width, width), nn.Linear(width, width), named

    def forward(self, x: torch.Tensor, times: int, kind: str, mask: torch.Tensor, nothing: None) -> Any:
        x = nn.functional.dropout(torch.tanh(self.inner(x)), 0.3) * times
        if self.named:
            with get_cuda_rng_tracker().fork():
                x = nn.functional.dropout(x, 0.5)
        return self.outer(x) + mask, kind, mask.bool()


class DropoutStack(nn.Module):
    """Four blocks with dropout; `run` checkpoints each two and, if nested, each one inside."""

    def __init__(
        self, run: Callable[..., Any], nested: bool = False, named: bool = True, width: int = 6
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DropoutBlock(width, named) for _ in range(4))
        self.run = run
        self.nested = nested

    def _pair(self, i: int, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[i : i + 2]:
            if self.nested:
                x, kind, flags = self.run(block, x, 3, "kind", mask, None)
            else:
                x, kind, flags = block(x, 3, "kind", mask, None)
            assert kind == "kind"
            assert flags.dtype == torch.bool
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(x.shape[-1])
        for i in (0, 2):
            # The input is used after the checkpoint, too: it must not have been emptied.
            x = x + self.run(self._pair, i, x, mask)
        return x


# ---------------------------------------------------------------- a language model

LANGUAGE_WIDTH, LANGUAGE_BLOCKS = 24, 4


class LanguageBlock(nn.Module):
    """A block with a norm, a parameter that may be unused, and a loss of its own on the side."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(LANGUAGE_WIDTH)
        self.up = nn.Linear(LANGUAGE_WIDTH, 2 * LANGUAGE_WIDTH)
        self.down = nn.Linear(2 * LANGUAGE_WIDTH, LANGUAGE_WIDTH)
        self.unused = nn.Parameter(torch.ones(3))
        self.side: Any = None
        self.uses_all = False

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up(self.norm(x)))
        self.side = hidden.square().mean()
        return x + self.down(hidden) + (self.unused.sum() * 0.01 if self.uses_all else 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "inside":
            return checkpoint(self.inner, x, use_reentrant=False)
        return self.inner(x)


class ReturnsBias(nn.Module):
    """Returns its parameter for the caller to add, as Megatron's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((LANGUAGE_WIDTH,), 0.5))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, nn.Parameter]:
        return x * 2, self.bias


class LanguageModel(nn.Module):
    """A small language model with everything that makes gathering hard, chosen by `kind`."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = kind
        self.embed = nn.Embedding(11, LANGUAGE_WIDTH)
        self.blocks = nn.ModuleList([LanguageBlock(kind) for _ in range(LANGUAGE_BLOCKS)])
        self.bias = ReturnsBias()
        self.scale = nn.Parameter(torch.ones(LANGUAGE_WIDTH))
        self.head = nn.Linear(LANGUAGE_WIDTH, 11, bias=False)
        self.pooler = nn.Linear(LANGUAGE_WIDTH, LANGUAGE_WIDTH)  # never used
        self.step = 0
        if kind == "tied":
            self.head.weight = self.embed.weight
        if kind == "frozen":
            for param in [*self.blocks[1].parameters(), *self.embed.parameters()]:
                param.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        order = list(range(LANGUAGE_BLOCKS))
        if self.kind == "shared":
            order = [0, 1, 0, 2, 3, 0]
        if self.kind == "dropped":
            order = [i for i in order if (self.step + i) % 3]
        for i in order:
            if self.kind == "reentrant":
                x = checkpoint(self.blocks[i], x, use_reentrant=True)
            elif self.kind == "shared reentrant":
                x = checkpoint(self.blocks[i // 2], x, use_reentrant=True)
            elif self.kind == "outside":
                x = checkpoint(self.blocks[i], x, use_reentrant=False)
            elif self.kind == "direct":
                x = x + self.blocks[i].down(torch.tanh(self.blocks[i].up(x)))
            else:
                x = self.blocks[i](x)
        x, bias = self.bias(x)
        x = (x + bias) * self.scale
        logits = F.linear(x, self.embed.weight) if self.kind == "functional" else self.head(x)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.roll(-1, 1).flatten())
        if self.kind == "side":
            loss = loss + 0.1 * sum(block.side for block in self.blocks)
        return loss


# ---------------------------------------------------------------- outputs that are changed in place


class Pair(nn.Module):
    """Returns two views of one tensor."""

    def __init__(self, chunked: bool) -> None:
        super().__init__()
        self.both = nn.Linear(WIDTH, 2 * WIDTH)
        self.chunked = chunked

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.both(x)
        return y.chunk(2, dim=-1) if self.chunked else (y[..., :WIDTH], y[..., WIDTH:])


class InItsInput(nn.Module):
    """Changes what it was given, and returns that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += torch.tanh(x) @ self.weight
        return x


class ChangedInPlace(nn.Module):
    """Modules of several outputs between blocks; `way` uses one of them and changes what it returns."""

    def __init__(self, way: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.pair, self.chunks, self.own = Pair(chunked=False), Pair(chunked=True), InItsInput()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(2, 2, WIDTH)  # a Linear's output is a view for such inputs
        for block in self.blocks:
            h = self.way(self, x)
            x = x + F.relu(block(h), inplace=True)
        return x


# ---------------------------------------------------------------- adapters on frozen layers


class FrozenBase(nn.Module):
    """A frozen base and a trained head, as with adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.ones(3), requires_grad=False)
        self.base = nn.Sequential(nn.Linear(7, 61), nn.Tanh(), nn.Linear(61, 37)).requires_grad_(False)
        self.register_buffer("scale", torch.rand(37))
        self.head = nn.Linear(37, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(x) * self.scale)


class Lora(nn.Module):
    """As PEFT builds them: the frozen layer, and trained ones in dictionaries of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, WIDTH, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class LoraBlock(nn.Module):
    """A block of frozen layers with two adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.conv = nn.Conv1d(1, 1, 3, padding=1).requires_grad_(False)
        self.up, self.down = Lora(), Lora()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(self.norm(x)[:, None])[:, 0]
        return x + self.down(torch.tanh(self.up(h)))


class LoraStack(nn.Module):
    """Frozen layers with adapters, in checkpoints as `how` names them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList([LoraBlock() for _ in range(3)])
        self.head = nn.Linear(WIDTH, 3).requires_grad_(False)
        self.how = how

    def _pair(self, x: torch.Tensor) -> torch.Tensor:
        """A checkpoint around checkpoints."""
        for layer in self.layers[:2]:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        if "input" in self.how:
            x.requires_grad_(True)  # as enable_input_require_grads does
        layers = list(self.layers)
        if "nested" in self.how:
            x = checkpoint(self._pair, x, use_reentrant=False)
            layers = layers[2:]
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant="reentrant" in self.how)
        return self.head(x)


# ---------------------------------------------------------------- Megatron-style layers over a group

HIDDEN = 12
"""Width of the MLP between its layers."""


class _Copy(torch.autograd.Function):
    """The same input on every rank; its gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum of every rank's part; each gets its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


def whole_weights() -> dict[str, torch.Tensor]:
    """float64; the gradient of the replicated ones is not small."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.4

    return {
        "scale": normal(FEATURES) + 1,
        "column": normal(HIDDEN, FEATURES),
        "column_bias": normal(HIDDEN),
        "row": normal(OUTPUTS, HIDDEN),
        "row_bias": normal(OUTPUTS),
    }


DIVIDED = {"column": 0, "column_bias": 0, "row": 1}
"""Dimension in which a weight is divided over tensor-parallel ranks; the others are replicated."""


def shard(name: str, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    return whole.chunk(size, DIVIDED[name])[rank] if name in DIVIDED else whole


class ParallelMLP(nn.Module):
    """Column-parallel, then row-parallel; whole with `group` None. `mark`: Megatron's attribute on divided weights."""

    def __init__(self, group: Any = None, mark: str = "tensor_model_parallel") -> None:
        super().__init__()
        self.group = group
        size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        for name, whole in whole_weights().items():
            param = nn.Parameter(shard(name, whole, size, rank).clone().float())
            setattr(param, mark, name in DIVIDED)
            setattr(self, name, param)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        if self.group is not None:
            x = _Copy.apply(x, self.group)
        hidden = torch.tanh(nn.functional.linear(x, self.column, self.column_bias))
        out = nn.functional.linear(hidden, self.row)
        if self.group is not None:
            out = _Sum.apply(out, self.group)
        return out + self.row_bias


class Half(nn.Module):
    """Half of the same MLP, for a pipeline of two stages: scale and column, or row."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        for name in (("scale", "column", "column_bias"), ("row", "row_bias"))[number]:
            setattr(self, name, nn.Parameter(whole_weights()[name].float()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.number == 0:
            return torch.tanh(nn.functional.linear(x * self.scale, self.column, self.column_bias))
        return nn.functional.linear(x, self.row, self.row_bias)
