"""The emulated arithmetic of backend "fake", on real operators, against its definition computed another way."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tests.backends import fake_tools
from xtrain.backends.fake import PROFILES, Numerics, choose, switched
from xtrain.backends.fake.mode import mode
from xtrain.backends.fake.rounding import shorten
from xtrain.base.errors import ConfigError, NotImplementedYetError

QUICK = settings(max_examples=60, deadline=None)
FLOATS = st.floats(width=32, allow_nan=False)
ROUNDINGS = ("nearest-even", "nearest-away", "toward-zero")


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grown(function: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The result of a function, and its gradients with respect to all inputs for a fixed gradient of the result."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    weights = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view(result.shape)
    (result * weights).sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


# ---------------------------------------------------------------- rounding


@QUICK
@given(
    st.lists(FLOATS, min_size=1, max_size=8),
    st.sampled_from(sorted(fake_tools.STORED)),
    st.sampled_from(ROUNDINGS),
)
def test_numbers_are_rounded_as_fractions_say(values: list[float], name: str, rounding: str) -> None:
    stored = fake_tools.STORED[name]
    got = shorten(torch.tensor(values), 23 - stored, rounding)
    expected = [fake_tools.rounded(value, stored, rounding) for value in values]
    assert got.tolist() == expected
    assert [np.signbit(x) for x in got.tolist()] == [np.signbit(x) for x in expected]


def test_every_nan_stays_one() -> None:
    for bits in (0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF):
        x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        assert x.isnan().all()
        for rounding in ROUNDINGS:
            assert shorten(x, 13, rounding).isnan().all()
    assert shorten(torch.zeros(0), 13, "nearest-even").shape == (0,)


def test_ties() -> None:
    """1 + 2^-11 lies in the middle of two TF32 numbers; 1 + 3 * 2^-11 too, with an odd one below."""
    x = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11])
    for rounding, expected in (
        ("nearest-even", [1.0, 1 + 2.0**-9]),
        ("nearest-away", [1 + 2.0**-10, 1 + 2.0**-9]),
        ("toward-zero", [1.0, 1 + 2.0**-10]),
    ):
        assert shorten(x, 13, rounding).tolist() == expected


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("products", ["tf32", "hf32", "bf16", "fp16"])
def test_products_see_rounded_inputs_forward_and_backward(products: str) -> None:
    """Values whose rounded products add up exactly in float32: bits equal those of float64 on rounded inputs."""

    def cut(x: torch.Tensor) -> torch.Tensor:
        if products in fake_tools.STORED:
            return x.clone().apply_(
                lambda v: fake_tools.rounded(v, fake_tools.STORED[products], "nearest-even")
            )
        return x.to(torch.bfloat16 if products == "bf16" else torch.float16).float()

    generator = torch.Generator().manual_seed(3)
    a = torch.randint(-(2**13), 2**13, (3, 2), generator=generator).float() / 2**13
    b = torch.randint(-(2**13), 2**13, (2, 4), generator=generator).float() / 2**13
    c = torch.randint(-(2**13), 2**13, (3, 4), generator=generator).float() / 2**13
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    with switched(Numerics(products=products)):
        got = x @ y
        got.backward(c)
    for found, left, right in ((got, a, b), (x.grad, c, b.t()), (y.grad, a.t(), c)):
        exact = cut(left).double() @ cut(right).double()
        assert found is not None
        # Two or four products of at most 24 bits: one rounding of the sum is allowed for.
        assert bool(((found.double() - exact).abs() <= exact.abs() * 2.0**-22 + 2.0**-24).all())
        assert not torch.equal(found, left @ right)


def test_a_tf32_product_by_hand() -> None:
    """(1 + 2^-12) * 3 is 3 in TF32; the host keeps the small part."""
    a, b = torch.tensor([[1 + 2.0**-12]]), torch.tensor([[3.0]])
    assert (a @ b).item() == 3 + 3 * 2.0**-12
    with switched(Numerics(products="tf32")):
        assert (a @ b).item() == 3.0
        assert (a * b).item() == 3 + 3 * 2.0**-12  # not a product of matrices
        assert torch.mm(a, b, out=torch.empty(1, 1)).item() == 3.0
        assert (a.double() @ b.double()).item() == 3 + 3 * 2.0**-12
        with torch.inference_mode():
            assert F.linear(a, b).item() == 3.0
        convolved = F.conv1d(a[None], b[None])
        assert convolved.item() == 3.0
        assert torch.dot(a[0], b[0]).item() == 3.0
        assert torch.mv(a, b[0]).item() == 3.0
        assert torch.baddbmm(torch.ones(1, 1, 1), a[None], b[None], beta=2, alpha=3).item() == 11.0


@QUICK
@given(st.integers(1, 9), st.integers(0, 2**31), st.sampled_from(["fp32", "fp16", "fp64"]))
def test_products_are_added_in_order_in_the_accumulator(length: int, seed: int, accumulation: str) -> None:
    a, b = draw(3, length, seed=seed), draw(length, 2, seed=seed + 1)
    kind = {"fp32": np.float32, "fp16": np.float16, "fp64": np.float64}[accumulation]
    with switched(Numerics(block=1, accumulation=accumulation)):
        got = a @ b
    assert got.tolist() == fake_tools.product_in_order(a.numpy(), b.numpy(), kind).tolist()


def test_blocks_are_added_after_each_other() -> None:
    """2^24 + 1 is not a float32: ones are lost one by one, and not when two of them are added first."""
    a = torch.tensor([[2.0**24, 0.0, 1.0, 1.0, 1.0, 1.0]])
    for block, expected in ((1, 2.0**24), (2, 2.0**24 + 4)):
        with switched(Numerics(block=block)):
            assert (a @ torch.ones(6, 1)).item() == expected


def test_fused_operators_with_products_inside_are_refused_or_taken_apart() -> None:
    q = draw(1, 2, 4, 8)
    with switched(Numerics(products="bf16")):
        got = F.scaled_dot_product_attention(q, q, q)
        cut = q.bfloat16().float()
        weights = torch.softmax((cut @ cut.transpose(-1, -2)) / 8**0.5, -1)
    assert (got - weights @ q).abs().max() < 0.02
    assert not torch.equal(got, F.scaled_dot_product_attention(q, q, q))
    with switched(Numerics(products="bf16")), pytest.raises(NotImplementedYetError, match="addbmm"):
        torch.addbmm(draw(2, 2), draw(1, 2, 2), draw(1, 2, 2))


# ---------------------------------------------------------------- sums


@QUICK
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.integers(1, 9))
def test_sums_follow_the_workers(values: list[float], each: int) -> None:
    x = torch.tensor(values)
    expected = float(fake_tools.worker_sum(values, each))
    with switched(Numerics(sums=each)):
        assert x.sum().item() == expected
        assert x[None].sum(-1, keepdim=True).tolist() == [[expected]]
        assert x[:, None].expand(-1, 2).sum(0).tolist() == [expected] * 2
        assert x.mean().item() == float(np.float32(np.float32(expected) / np.float32(len(values))))


def test_sums_over_several_dimensions() -> None:
    x = draw(3, 4, 5)
    with switched(Numerics(sums=2)):
        leading, trailing, outer = x.sum((0, 1)), x.sum((1, 2)), x.sum((0, 2))
    for i in range(5):
        assert leading[i].item() == fake_tools.worker_sum(x[:, :, i].flatten().tolist(), 2)
    for i in range(3):
        assert trailing[i].item() == fake_tools.worker_sum(x[i].flatten().tolist(), 2)
    for i in range(4):
        assert outer[i].item() == fake_tools.worker_sum(x[:, i].flatten().tolist(), 2)


OPERATORS: dict[str, tuple[Any, list[torch.Tensor]]] = {
    "softmax": (lambda x: x.softmax(-1), [draw(5, 37)]),
    "softmax over the first": (lambda x: x.softmax(0), [draw(37, 3)]),
    "log_softmax": (lambda x: x.log_softmax(-1), [draw(5, 37)]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (37,), w, b), [draw(2, 3, 37), draw(37), draw(37, seed=2)]),
    "layer_norm without weights": (lambda x: F.layer_norm(x, (3, 7)), [draw(2, 3, 7)]),
    "rms_norm": (lambda x, w: F.rms_norm(x, (37,), w), [draw(2, 3, 37), draw(37)]),
    "variance": (lambda x: x.var(-1), [draw(5, 37)]),
    "std": (lambda x: x.std((0, 1), correction=0), [draw(5, 7, 3)]),
    "norm": (lambda x: torch.linalg.vector_norm(x, dim=-1), [draw(5, 37)]),
    "mse": (lambda x, y: F.mse_loss(x, y), [draw(7, 501), draw(7, 501, seed=2)]),
    "cross_entropy": (
        lambda x: F.cross_entropy(x, torch.arange(37) % 5, ignore_index=3), [draw(37, 5)]
    ),
    "attention": (lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), [draw(1, 2, 9, 8)]),
    "linear": (lambda x, w, b: F.linear(x, w, b), [draw(2, 9, 37), draw(5, 37), draw(5)]),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OPERATORS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_stay_near_float64_and_leave_the_host_order(name: str, dtype: torch.dtype) -> None:
    function, inputs = OPERATORS[name]
    inputs = [x.to(dtype) for x in inputs]
    exact = grown(function, *(x.double() for x in inputs))
    host = grown(function, *inputs)
    with switched(Numerics(sums=3, block=5)):
        got, again = grown(function, *inputs), grown(function, *inputs)
    for found, repeated, ours, theirs in zip(got, again, host, exact, strict=True):
        assert torch.equal(found, repeated)
        assert found.dtype == ours.dtype
        assert found.shape == ours.shape
        scale = theirs.abs().max()
        assert (found.double() - theirs).abs().max() <= 40 * torch.finfo(dtype).eps * scale + 1e-30
    if dtype == torch.float32:
        assert not all(torch.equal(a, b) for a, b in zip(got, host, strict=True))


# ---------------------------------------------------------------- denormals, saturation


def test_denormals_are_flushed_forward_and_backward() -> None:
    tiny = torch.finfo(torch.float32).tiny
    x = torch.tensor([tiny, -tiny, 1.0, float("nan"), float("inf")], requires_grad=True)
    with switched(Numerics(flush_denormals=True)):
        y = x * 0.5
        y.backward(torch.tensor([tiny, tiny, 2.0, 1.0, 1.0]))
        assert (torch.tensor([tiny]) * 0.75 + 0.0).item() == 0.0
        assert torch.tensor([2.0**-14]).half().mul(0.5).item() == 0.0  # 2^-15 is no normal float16
        accumulated = torch.tensor([tiny])
        accumulated.view(1, 1).mul_(0.5)
        assert accumulated.item() == 0.0  # a view, in place
        assert torch.full((1,), tiny / 2).item() > 0  # asked for, not computed
        assert torch.tensor([tiny]).double().mul(0.5).item() == tiny / 2
    assert y[:3].tolist() == [0.0, 0.0, 0.5]
    assert bool(y[3].isnan())
    assert bool(y[4].isinf())
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 0.5, 0.5]
    assert (x * 0.5)[0].item() == tiny / 2


def test_lists_copies_and_fused_optimizers_are_flushed_and_saturated() -> None:
    tiny = torch.finfo(torch.float32).tiny
    x = torch.tensor([tiny, 1.0])
    with switched(Numerics(flush_denormals=True)):
        torch._foreach_mul_([x], 0.5)
        weight = torch.tensor([1.0, 1.0], requires_grad=True)
        weight.grad = torch.tensor([1e-20, 1.0])
        adam = torch.optim.AdamW([weight], fused=True)
        adam.step()
    assert x.tolist() == [0.0, 0.5]
    assert adam.state[weight]["exp_avg_sq"][0].item() == 0.0  # 1e-43 otherwise
    half = torch.zeros(1, dtype=torch.float16)
    with switched(Numerics(saturate=True)) as emulated:
        half.copy_(torch.tensor([1e6]))
        assert half.item() == 65504.0
        assert emulated.overflowed


def test_norms_of_lists_follow_the_workers() -> None:
    parts = [draw(7, 13), draw(29, seed=2)]
    with switched(Numerics(sums=4)):
        got = torch._foreach_norm(parts, 2)
    for norm, part in zip(got, parts, strict=True):
        total = fake_tools.worker_sum(part.square().flatten().tolist(), 4)
        assert norm.item() == torch.tensor(total).sqrt().item()


def test_float16_saturates_and_tells() -> None:
    a = torch.full((2, 4), 300.0, dtype=torch.float16)
    with switched(Numerics(saturate=True)) as emulated:
        assert not emulated.overflowed
        assert (a @ a.t()).flatten().tolist() == [65504.0] * 4
        assert emulated.overflowed
        emulated.overflowed = False
        assert torch.tensor([1e6, -1e6]).half().tolist() == [65504.0, -65504.0]
        x = torch.tensor([3.0], dtype=torch.float16, requires_grad=True)
        (x * 60000.0).backward(torch.tensor([2.0], dtype=torch.float16))
        assert x.grad is not None
        assert x.grad.item() == 65504.0
        emulated.overflowed = False
        assert (a + a).max().item() == 600.0
        assert torch.full((1,), float("inf"), dtype=torch.float16).isinf().all()
        assert not emulated.overflowed
    assert (a @ a.t()).isinf().all()


# ---------------------------------------------------------------- on and off


def test_nothing_is_left_behind() -> None:
    x, flash = draw(33, 70), torch.backends.cuda.flash_sdp_enabled()
    before = x @ x.t(), x.softmax(-1), x.sum()
    with switched(choose("a100-tf32").numerics):
        assert not torch.backends.cuda.flash_sdp_enabled()
        with switched(Numerics(products="bf16")):
            inner = x @ x.t()
        outer = x @ x.t()
        assert not torch.equal(inner, outer)
    assert not mode().active
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == []
    assert not torch.equal(outer, before[0])
    for was, now in zip(before, (x @ x.t(), x.softmax(-1), x.sum()), strict=True):
        assert torch.equal(was, now)


def test_it_can_be_left_under_another_mode() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = draw(8, 8)
    context = switched(Numerics(products="bf16"))
    context.__enter__()
    with FlopCounterMode(display=False) as counter:
        emulated = x @ x
        context.__exit__(None, None, None)
        assert torch.equal(x @ x, draw(8, 8) @ draw(8, 8))
    assert counter.get_total_flops() > 0
    assert not torch.equal(emulated, x @ x)
    with switched(Numerics()):
        pass  # takes what was left off the stack
    assert torch.utils._python_dispatch._get_current_dispatch_mode_stack() == []


def test_children_of_a_fork_compute_as_the_host_does() -> None:
    """A loader's workers prepare data, which is not the chip's work."""
    x = draw(8, 8)
    expected = (x @ x).sum().item()
    with switched(Numerics(products="bf16")):
        child = os.fork()
        if child == 0:
            os._exit(0 if (x @ x).sum().item() == expected else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (x @ x).sum().item() != expected


def test_backward_that_checkpointing_recomputes() -> None:
    """Both kinds, one of which runs backward inside of backward."""
    x, weight = draw(6, 40), draw(40, 40)

    def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ w, -1) @ w

    with switched(choose("a100-tf32").numerics):
        plain = grown(block, x, weight)
        for reentrant in (False, True):
            run = partial(checkpoint, block, use_reentrant=reentrant)
            for a, b in zip(plain, grown(run, x, weight), strict=True):
                assert torch.equal(a, b)
    assert not torch.equal(plain[1], grown(block, x, weight)[1])


def test_no_profile_changes_nothing() -> None:
    x = draw(20, 30)
    with switched(choose("none").numerics):
        assert not mode().active
        got = x @ x.t()
    assert torch.equal(got, x @ x.t())


# ---------------------------------------------------------------- profiles


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_every_property_has_a_source(name: str) -> None:
    profile = PROFILES[name]
    plain, values = dataclasses.asdict(Numerics()), dataclasses.asdict(profile.numerics)
    assert {key for key in values if values[key] != plain[key]} <= set(profile.sources)
    assert set(profile.sources) <= set(values)
    if profile.costs is not None:
        assert {"flops", "memory", "link", "latency"} == set(profile.cost_sources)
    described = choose(name).describe()
    assert all(entry["source"] for entry in described["numerics"].values())


def test_profiles_are_changed_by_the_config() -> None:
    chosen = choose("a100-tf32", {"block": 8}, {"latency": 1.0})
    assert (chosen.numerics.block, chosen.numerics.products) == (8, "tf32")
    described = chosen.describe()
    assert described["numerics"]["block"] == {"value": 8, "source": "config"}
    assert described["cost"]["latency"] == {"value": 1.0, "source": "config"}
    assert "NVIDIA" in described["cost"]["memory"]["source"]
    assert choose("custom", {"sums": 1}).numerics == Numerics(sums=1)
    for wrong, said in (
        (("a100",), "did you mean 'a100-tf32'"),
        (("custom",), "says nothing by itself"),
        (("none", None, {}), "has no flops, memory, link"),
        (("none", None, {"profile": "h100"}), "unknown cost profile"),
    ):
        with pytest.raises(ConfigError, match=said):
            choose(*wrong)  # type: ignore[arg-type]
