"""amp_C against closed forms in float64, and its overflow flag."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xtrain.shims.apex import amp_C
from xtrain.shims.apex.multi_tensor_apply import MultiTensorApply, multi_tensor_applier

CHUNK = 2048
NARROW = (torch.float16, torch.bfloat16)


def flag(value: int = 0) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int32)


def tensors(seed: int, dtype: torch.dtype = torch.float32, positive: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in ((3, 5), (7,), (1, 1))]
    return [(given.abs() if positive else given).to(dtype) for given in made]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within a rounding or two of what float64 gives."""
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[found.dtype]
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


floats = st.floats(-4, 4, width=32)


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(floats, min_size=1, max_size=5),
    bad=st.sampled_from([None, math.inf, -math.inf, math.nan]),
    before=st.sampled_from([0, 1]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_scale_scales_and_flags_what_is_not_finite(values, bad, before, dtype):
    sources = [torch.tensor(values, dtype=dtype), torch.ones(2, dtype=dtype)]
    if bad is not None:
        sources[1][1] = bad
    targets = [torch.empty_like(given, dtype=torch.float32) for given in sources]
    noop = flag(before)
    multi_tensor_applier(amp_C.multi_tensor_scale, noop, [sources, targets], 0.5)
    assert noop.item() == (1 if bad is not None or before else 0)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target, source.float() * 0.5) or bad is not None


@pytest.mark.parametrize(("checked", "flagged"), [(-1, True), (0, False), (1, True)])
def test_axpby_looks_at_the_argument_that_it_is_told(checked, flagged):
    x, y, out = tensors(1), tensors(2), [torch.empty_like(given) for given in tensors(1)]
    y[0][0, 0] = math.inf
    noop = flag()
    amp_C.multi_tensor_axpby(CHUNK, noop, [x, y, out], 2.0, -3.0, checked)
    assert bool(noop.item()) is flagged
    torch.testing.assert_close(out[1], 2 * x[1] - 3 * y[1])


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_norms(dtype):
    given = tensors(3, dtype)
    wanted = torch.stack([part.double().norm() for part in given])
    noop = flag()
    norm, none = amp_C.multi_tensor_l2norm(CHUNK, noop, [given])
    assert (norm.shape, none.numel(), norm.dtype, noop.item()) == ((1,), 0, torch.float32, 0)
    close(norm[0], wanted.norm())
    _, each = amp_C.multi_tensor_l2norm(CHUNK, noop, [given], True)
    close(each, wanted)
    half, _ = amp_C.multi_tensor_unscale_l2norm(CHUNK, noop, [given], torch.tensor([0.5]), False)
    close(half[0], wanted.norm() / 2)
    out = [torch.empty_like(part) for part in given]
    same, _ = amp_C.multi_tensor_l2norm_scale(CHUNK, noop, [given, out], 4.0, False)
    assert torch.equal(same, norm)
    assert torch.equal(out[0], given[0] * 4)


def test_norm_flags_squares_that_overflow():
    noop = flag()
    norm, _ = amp_C.multi_tensor_l2norm(CHUNK, noop, [[torch.full((2,), 1e20)]])
    assert noop.item() == 1
    assert torch.isfinite(norm).all() or torch.isinf(norm).all()
    zero, _ = amp_C.multi_tensor_l2norm_mp(CHUNK, noop, [[torch.ones(3)]])
    assert zero.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("mode", [0, 1])
def test_adam_against_float64(mode, dtype):
    grads, params = tensors(4, dtype), tensors(5, dtype)
    moments, squares = tensors(6), tensors(7, positive=True)
    lr, b1, b2, eps, step, decay = 0.1, 0.9, 0.99, 1e-3, 3, 0.05
    wanted = []
    for g, p, m, v in zip(
        *[[t.double() for t in ts] for ts in (grads, params, moments, squares)], strict=True
    ):
        g = g + decay * p if mode == 0 else g
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        update = m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + eps)
        wanted.append((p - lr * (update + (decay * p if mode == 1 else 0)), m, v))
    noop = flag(1)  # Adam does not look at it
    amp_C.multi_tensor_adam(
        CHUNK, noop, [grads, params, moments, squares], lr, b1, b2, eps, step, mode, 1, decay
    )
    for found, expected in zip(zip(params, moments, squares, strict=True), wanted, strict=True):
        for one, other in zip(found, expected, strict=True):
            close(one, other)


def test_capturable_adam_unscales_and_heeds_the_flag():
    made = lambda: [tensors(4), tensors(5), tensors(6), tensors(7, positive=True)]  # noqa: E731
    plain, captured = made(), made()
    captured[0] = [grad * 8 for grad in captured[0]]
    rest = (0.9, 0.99, 1e-8, torch.tensor([2]), 1, 1, 0.01)
    tail = (torch.tensor([1 / 8.0]),)
    before = [param.clone() for param in captured[1]]
    amp_C.multi_tensor_adam_capturable(CHUNK, flag(1), captured, torch.tensor(0.1), *rest, *tail)
    assert all(torch.equal(a, b) for a, b in zip(before, captured[1], strict=True))
    amp_C.multi_tensor_adam_capturable(CHUNK, flag(), captured, torch.tensor(0.1), *rest, *tail)
    amp_C.multi_tensor_adam(CHUNK, flag(), plain, 0.1, 0.9, 0.99, 1e-8, 2, 1, 1, 0.01)
    for one, other in zip(captured[1] + captured[0], plain[1] + plain[0], strict=True):
        torch.testing.assert_close(one, other)
    half = [
        [grad.half() for grad in made()[0]],
        [param.half() for param in made()[1]],
        *made()[2:],
        made()[1],
    ]
    amp_C.multi_tensor_adam_capturable_master(
        CHUNK, flag(), half, torch.tensor(0.1), *rest, torch.tensor([1.0])
    )
    assert all(torch.equal(p, master.half()) for p, master in zip(half[1], half[4], strict=True))


def test_sgd_skips_when_flagged_and_copies_to_16_bits():
    grads, weights, momenta = tensors(1), tensors(2), tensors(3)
    copies = [weight.half() for weight in weights]
    lists = [grads, weights, momenta, copies]
    before = [weight.clone() for weight in weights]
    amp_C.multi_tensor_sgd(CHUNK, flag(1), lists, 0.1, 0.9, 0.0, 0.5, False, False, False, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    wanted = [
        w.double() - 0.5 * (0.9 * m.double() + 0.25 * g.double() + 0.1 * w.double())
        for g, w, m in zip(grads, weights, momenta, strict=True)
    ]
    amp_C.multi_tensor_sgd(CHUNK, flag(), lists, 0.1, 0.9, 0.0, 0.5, False, False, False, 0.25)
    for weight, copy, expected in zip(weights, copies, wanted, strict=True):
        close(weight, expected)
        assert torch.equal(copy, weight.half())


def test_lists_that_do_not_fit_are_named():
    with pytest.raises(RuntimeError, match="multi_tensor_scale takes 2 lists of tensors, not 1"):
        amp_C.multi_tensor_scale(CHUNK, flag(), [tensors(1)], 1.0)
    with pytest.raises(RuntimeError, match="different lengths"):
        amp_C.multi_tensor_scale(CHUNK, flag(), [tensors(1), tensors(1)[:2]], 1.0)
    with pytest.raises(RuntimeError, match="different sizes"):
        amp_C.multi_tensor_scale(CHUNK, flag(), [[torch.ones(2)], [torch.ones(3)]], 1.0)


def test_lamb_in_two_stages_is_lamb_in_one():
    one = [tensors(1), tensors(2), tensors(3), tensors(4, positive=True)]
    two = [tensors(1), tensors(2), tensors(3), tensors(4, positive=True)]
    norm = torch.tensor([3.0])
    amp_C.multi_tensor_lamb(CHUNK, flag(), one, 0.1, 0.9, 0.99, 1e-6, 2, 1, 0.01, 1, 1, norm, 1.0, False)
    updates = [torch.empty_like(grad) for grad in two[0]]
    amp_C.multi_tensor_lamb_stage1_cuda(
        CHUNK, flag(), [*two, updates], torch.full((3,), 0.01), 2, 0.9, 0.99, 1e-6, norm, 1.0
    )
    norms = [amp_C.multi_tensor_l2norm(CHUNK, flag(), [given], True)[1] for given in (two[1], updates)]
    amp_C.multi_tensor_lamb_stage2_cuda(CHUNK, flag(), [two[1], updates], *norms, 0.1, 0.01, False)
    for found, wanted in zip(two[1] + updates, one[1] + one[0], strict=True):
        torch.testing.assert_close(found, wanted)


def test_scale_with_hysteresis_shrinks_at_the_second_overflow():
    scale, growth, patience = torch.tensor([8.0]), torch.tensor([1]), torch.tensor([2])
    seen = []
    for overflow in (1.0, 1.0, 0.0, 0.0, 0.0):
        amp_C.update_scale_hysteresis(scale, growth, patience, torch.tensor([overflow]), 2.0, 0.5, 3, 2)
        seen.append((scale.item(), growth.item(), patience.item()))
    assert seen == [(8.0, 0, 1), (4.0, 0, 0), (4.0, 1, 2), (4.0, 2, 2), (8.0, 0, 2)]


def test_the_applier_says_that_it_is_there():
    assert multi_tensor_applier.available
    assert MultiTensorApply(7)(lambda chunk, noop, lists, extra: (chunk, extra), flag(), [[]], "x") == (
        7,
        "x",
    )
