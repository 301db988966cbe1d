"""Random numbers outside of the forward pass that are the same on every device: `with aligned_init(seed):`.

Inside, what torch draws (nn.init, Tensor.normal_, torch.randn, ...) comes from Philox counters keyed by
(seed, number of the draw). Dropout in a forward pass is the affair of aligned_random.py.

Every number is computed on the host in float64 with additions, multiplications, divisions and square
roots only, which IEEE 754 defines to the last bit, and rounded once to the tensor's dtype. Library
functions such as log or cos, which differ in their last bit between processors, are not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xtrain.base.errors import NotImplementedYetError
from xtrain.reproducible.aligned_random import random_words

_DOMAIN = 0xFFFFFFFF
"""In place of step and slot: no dropout mask is drawn from these counters."""
_CHUNK = 1 << 16  # elements at a time, which bounds the memory of the int64 and float64 intermediates

# Algorithm AS 241 (Wichura, Applied Statistics 37, 1988), PPND16: numerator and denominator, from the
# highest power down, in the middle, in the tails, and far out in them.
_MIDDLE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852854561, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
_TAIL = (
    (7.7454501427834140764e-4, 2.27238449892691845833e-2, 2.4178072517745061177e-1, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 1.51986665636164571966e-2, 1.4810397642748007459e-1,
     6.8976733498510000455e-1, 1.6763848301838038494, 2.05319162663775882187, 1.0),
)  # fmt: skip
_FAR = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.2426609473880784386e-3, 2.6532189526576123093e-2,
     2.9656057182850489123e-1, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.9983220655588793769e-1, 1.0),
)  # fmt: skip

_LOG_SERIES = tuple(1.0 / n for n in range(23, 0, -2))
"""Of 2 artanh(s) / 2s = 1 + s^2/3 + s^4/5 + ..., highest power first."""


def _horner(coefficients: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result.mul_(x).add_(coefficient)
    return result


def _ratio(polynomials: tuple[Sequence[float], Sequence[float]], x: torch.Tensor) -> torch.Tensor:
    return _horner(polynomials[0], x) / _horner(polynomials[1], x)


def exact_log(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of positive float64 numbers, by arithmetic alone; relative error below 1e-14."""
    mantissa, exponent = torch.frexp(x)  # mantissa in [0.5, 1)
    low = mantissa < math.sqrt(0.5)
    mantissa = torch.where(low, mantissa * 2, mantissa)
    s = (mantissa - 1) / (mantissa + 1)
    return 2 * s * _horner(_LOG_SERIES, s * s) + (exponent - low.int()).double() * math.log(2)


def normal_quantile(p: torch.Tensor) -> torch.Tensor:
    """The standard normal deviate below which a normal variable is with probability `p`.

    Args:
        p: one-dimensional, float64 in (0, 1).

    Returns:
        float64, relative error about 1e-15 (algorithm AS 241).
    """
    q = p - 0.5
    result = q * _ratio(_MIDDLE, 0.180625 - q * q)
    outside = torch.nonzero(q.abs() > 0.425).flatten()
    tail = p[outside]
    r = torch.sqrt(-exact_log(torch.minimum(tail, 1 - tail)))
    size = _ratio(_TAIL, r - 1.6)
    far = torch.nonzero(r > 5.0).flatten()
    size[far] = _ratio(_FAR, r[far] - 5.0)
    result[outside] = torch.where(tail < 0.5, -size, size)
    return result


class AlignedInit(TorchDispatchMode):
    """See `aligned_init`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.draws = 0
        """Tensors drawn so far."""

    # ---------------------------------------------------------------- numbers

    def _fill(
        self, target: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor], words_each: int = 1
    ) -> torch.Tensor:
        """Fill a tensor with `make(words)`, where words are (elements, `words_each`) uniform 32-bit integers."""
        draw = self.draws
        self.draws += 1
        if target.device.type == "meta":
            return target
        host = torch.device("cpu")
        result = torch.empty(target.numel(), dtype=target.dtype)
        for start in range(0, target.numel(), _CHUNK):
            count = min(_CHUNK, target.numel() - start)
            first = start * words_each // 4
            words = random_words(count * words_each, self.seed, (draw, _DOMAIN, _DOMAIN), host, first)
            result[start : start + count] = make(words.view(count, words_each))
        return target.copy_(result.view(target.shape))

    def uniform(self, target: torch.Tensor, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Uniform in [low, high), in steps of 2^-24 of the range (2^-53, 2^-11, 2^-8 in float64, fp16, bf16)."""
        _check_floating(target)
        if target.dtype == torch.float64:
            return self._fill(target, lambda w: low + (high - low) * _fraction53(w), 2)
        bits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}.get(target.dtype, 24)
        return self._fill(target, lambda w: low + (high - low) * _fraction(w[:, 0], bits))

    def normal(self, target: torch.Tensor, mean: Any = 0.0, std: Any = 1.0) -> torch.Tensor:
        """Normal by inverse distribution function of the middles of 2^32 equal intervals."""
        _check_floating(target)
        if not (torch.is_tensor(mean) or torch.is_tensor(std)):
            return self._fill(
                target, lambda w: mean + std * normal_quantile((w[:, 0].double() + 0.5) * 2.0**-32)
            )
        standard = self.normal(torch.empty(target.shape, dtype=torch.float64))
        mean, std = (value.cpu().double() if torch.is_tensor(value) else value for value in (mean, std))
        return target.copy_(mean + std * standard)

    def integers(self, target: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Uniform integers in [low, high)."""
        span = high - low
        if span <= 2**31:
            return self._fill(target, lambda w: low + ((w[:, 0] * span) >> 32))
        return self._fill(target, lambda w: low + ((w[:, 0] << 31) + (w[:, 1] >> 1)) % span, 2)

    def bernoulli(self, target: torch.Tensor, p: Any) -> torch.Tensor:
        """1 with probability p, else 0."""
        if not torch.is_tensor(p):
            return self._fill(target, lambda w: w[:, 0] < round(p * 2.0**32))
        uniform = self.uniform(torch.empty(target.shape, dtype=torch.float64))
        return target.copy_(uniform < p.cpu().double())

    def permutation(self, target: torch.Tensor) -> torch.Tensor:
        """0 to n - 1 in the order of n random 62-bit keys."""
        keys = self.integers(torch.empty(target.shape, dtype=torch.int64), 0, 2**62)
        return target.copy_(torch.argsort(keys, stable=True))

    # ---------------------------------------------------------------- interception

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags and func not in _EXACT:
            return func(*args, **kwargs)
        if kwargs.pop("generator", None) is not None or any(isinstance(a, torch.Generator) for a in args):
            raise NotImplementedYetError(
                f"{func.overloadpacket.__name__} with a generator of its own inside aligned_init",
                "leave the generator out, or draw outside of the context",
            )
        handler = _EXACT.get(func) or _HANDLERS.get(func.overloadpacket.__name__)
        if handler is None:
            raise NotImplementedYetError(
                f"{func.overloadpacket.__name__} inside aligned_init",
                "draw with normal, uniform, randint, bernoulli or randperm, or outside of the context",
            )
        return handler(self, args, kwargs)


def _check_floating(target: torch.Tensor) -> None:
    if not target.is_floating_point():
        dtype = str(target.dtype).removeprefix("torch.")
        raise NotImplementedYetError(
            f"drawing real numbers into a {dtype} tensor inside aligned_init", "use a floating-point tensor"
        )


def _fraction(words: torch.Tensor, bits: int) -> torch.Tensor:
    """float64 multiples of 2^-bits in [0, 1)."""
    return (words >> (32 - bits)).double() * 2.0**-bits


def _fraction53(words: torch.Tensor) -> torch.Tensor:
    return ((words[:, 0] << 21) + (words[:, 1] >> 11)).double() * 2.0**-53


def _new(size: Any, kwargs: dict[str, Any], dtype: torch.dtype | None = None) -> torch.Tensor:
    """An empty tensor for a function that makes one."""
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    kwargs.setdefault("dtype", dtype or torch.get_default_dtype())
    return torch.empty(size, **kwargs)


def _like(tensor: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    return torch.empty_like(tensor, **{name: value for name, value in kwargs.items() if value is not None})


def _bounds(args: Sequence[Any]) -> tuple[int, int]:
    """(low, high) of functions that take (high) or (low, high)."""
    return (0, args[0]) if len(args) == 1 else (args[0], args[1])


def _randint(mode: AlignedInit, args: Any, kwargs: Any) -> torch.Tensor:
    *bounds, size = args
    return mode.integers(_new(size, kwargs, torch.int64), *_bounds(bounds))


def _normal(mode: AlignedInit, args: Any, kwargs: Any) -> torch.Tensor:
    """torch.normal: means and deviations as tensors or numbers, or numbers and a size."""
    mean, std, *size = [*args, kwargs.pop("std", 1.0)] if len(args) == 1 else args
    if size:
        return mode.normal(_new(size[0], kwargs), mean, std)
    shape = torch.broadcast_shapes(*(value.shape for value in (mean, std) if torch.is_tensor(value)))
    like = mean if torch.is_tensor(mean) else std
    return mode.normal(torch.empty(shape, dtype=like.dtype, device=like.device), mean, std)


def _random_(mode: AlignedInit, args: Any, kwargs: Any) -> torch.Tensor:
    target, *bounds = args
    if not bounds or None in bounds:
        raise NotImplementedYetError("Tensor.random_() without bounds inside aligned_init", "pass the bounds")
    return mode.integers(target, *_bounds(bounds))


def _bernoulli(mode: AlignedInit, args: Any, kwargs: Any) -> torch.Tensor:
    return mode.bernoulli(torch.empty_like(args[0]), args[1] if len(args) > 1 else args[0])


def _erfinv(x: torch.Tensor) -> torch.Tensor:
    host = x.cpu().double()
    inside = host.abs() < 1
    middle = (torch.where(inside, host, 0.0).flatten() + 1) / 2
    value = normal_quantile(middle).view(host.shape) / math.sqrt(2)
    edges = torch.where(host.abs() == 1, host * math.inf, math.nan)
    return torch.where(inside, value, edges).to(x)


_HANDLERS: dict[str, Callable[[AlignedInit, Any, Any], torch.Tensor]] = {
    "normal_": lambda mode, args, kwargs: mode.normal(*args, **kwargs),
    "uniform_": lambda mode, args, kwargs: mode.uniform(
        args[0], *args[1:], **{{"from": "low", "to": "high"}[name]: value for name, value in kwargs.items()}
    ),
    "bernoulli_": lambda mode, args, kwargs: mode.bernoulli(args[0], kwargs.get("p", [*args, 0.5][1])),
    "random_": _random_,
    "bernoulli": _bernoulli,
    "normal": _normal,
    "rand": lambda mode, args, kwargs: mode.uniform(_new(args[0], kwargs)),
    "randn": lambda mode, args, kwargs: mode.normal(_new(args[0], kwargs)),
    "rand_like": lambda mode, args, kwargs: mode.uniform(_like(args[0], kwargs)),
    "randn_like": lambda mode, args, kwargs: mode.normal(_like(args[0], kwargs)),
    "randint": _randint,
    "randint_like": lambda mode, args, kwargs: mode.integers(_like(args[0], kwargs), *_bounds(args[1:])),
    "randperm": lambda mode, args, kwargs: mode.permutation(_new(args[0], kwargs, torch.int64)),
}

# Not random, but part of older torch's trunc_normal_, and rounded differently by each device.
_EXACT: dict[Any, Callable[[AlignedInit, Any, Any], torch.Tensor]] = {
    torch.ops.aten.erfinv.default: lambda mode, args, kwargs: _erfinv(args[0]),
    torch.ops.aten.erfinv_.default: lambda mode, args, kwargs: args[0].copy_(_erfinv(args[0])),
    torch.ops.aten.log_.default: lambda mode, args, kwargs: args[0].copy_(_log(args[0])),
}


def _log(x: torch.Tensor) -> torch.Tensor:
    host = x.cpu().double()
    positive = torch.where(host > 0, host, 1.0)
    return torch.where(host > 0, exact_log(positive), torch.where(host == 0, -math.inf, math.nan)).to(x)


def aligned_init(seed: int = 1234) -> AlignedInit:
    """A context in which torch's random numbers are the same bits on every device.

    Example::

        with deepspeed.aligned_init(seed=args.seed):
            model = build_model()

    Covered: nn.init and the layers' own reset_parameters, Tensor.normal_, uniform_, bernoulli_ and random_,
    torch.rand, randn, randint, normal, bernoulli, randperm and the `_like` functions. Other random functions,
    and those given a generator, are refused by name. The n-th draw in the context is a function of seed and n
    alone; torch's own generators are neither used nor moved.

    Args:
        seed: of all draws in the context.
    """
    return AlignedInit(seed)
