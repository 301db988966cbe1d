"""GLM: the mask and positions of the paper's worked example, sizes, initialisation, invariances."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from xtrain.data.infilling import infill
from xtrain.models.glm import GLM, IGNORE_INDEX, GLMConfig, attention_mask, rotary_angles, rotate

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
MASK, START, END = 100, 101, 102


def _config(name: str) -> GLMConfig:
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    del values["name"]
    return GLMConfig(**values)


def _worked_example():  # Du et al., ACL 2022, figure 2: x3 and x5 x6 are cut, and predicted in the other order
    return infill([1, 2, 3, 4, 5, 6], [(2, 3), (4, 6)], [1, 0], MASK, START, END)


def test_worked_example_of_the_paper() -> None:
    sample = _worked_example()
    assert sample.input_ids.tolist() == [1, 2, MASK, 4, MASK, START, 5, 6, START, 3]
    assert sample.labels.tolist() == [IGNORE_INDEX] * 5 + [5, 6, END, 3, END]
    assert sample.position_ids[0].tolist() == [1, 2, 3, 4, 5, 5, 5, 5, 3, 3]
    assert sample.position_ids[1].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 1, 2]
    assert sample.context_length == 5


def test_mask_of_the_worked_example() -> None:
    seen = attention_mask(torch.tensor([5]), 10)[0, 0]
    expected = np.zeros((10, 10), dtype=bool)
    expected[:, :5] = True  # everybody sees all of part A
    for query in range(5, 10):  # part B sees the spans before its own, and its own up to itself
        expected[query, 5 : query + 1] = True
    assert np.array_equal(seen.numpy(), expected)


def test_information_flows_as_the_mask_says() -> None:
    """Changing a token changes exactly the outputs that may see it."""
    torch.manual_seed(0)
    model = GLM(GLMConfig(128, 2, 16, 2, 24)).double()
    sample = _worked_example()
    ids = torch.from_numpy(sample.input_ids)[None].clone()
    positions, context = torch.from_numpy(sample.position_ids)[None], torch.tensor([sample.context_length])
    before = model(ids, positions, context)[0]
    for changed in range(10):
        other = ids.clone()
        other[0, changed] = 7
        moved = (model(other, positions, context)[0] - before).abs().amax(dim=-1) > 1e-12
        visible = [True] * 10 if changed < 5 else [query >= changed for query in range(10)]
        assert moved.tolist() == visible


def test_glm_130b_has_130_billion_parameters() -> None:
    with torch.device("meta"):
        count = sum(param.numel() for param in GLM(_config("glm_130b")).parameters())
    layers, hidden, ffn, vocabulary = 70, 12288, 32768, 150528
    attention = 4 * hidden * hidden + 4 * hidden
    feed_forward = 3 * hidden * ffn + 2 * ffn + hidden
    assert count == layers * (attention + feed_forward + 4 * hidden) + vocabulary * hidden
    assert count == pytest.approx(130e9, rel=0.015)


@pytest.mark.parametrize(("name", "size"), [("glm_110m", 110e6), ("glm_335m", 335e6), ("glm_10b", 10e9)])
def test_named_sizes(name: str, size: float) -> None:
    with torch.device("meta"):
        count = sum(param.numel() for param in GLM(_config(name)).parameters())
    assert count == pytest.approx(size, rel=0.05)


def test_first_loss_is_that_of_guessing() -> None:
    torch.manual_seed(0)
    config = _config("glm_tiny")
    sample = _worked_example()
    batch = [torch.from_numpy(array)[None] for array in (sample.input_ids, sample.position_ids)]
    loss = GLM(config)(*batch, torch.tensor([5]), torch.from_numpy(sample.labels)[None])
    assert loss.item() == pytest.approx(math.log(config.vocab_size), rel=0.05)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(i: int, j: int) -> float:
        a, b = (rotary_angles(torch.tensor([[p]]), 8).double() for p in (i, j))
        assert rotate(query, a).norm() == pytest.approx(query.norm().item())
        return float((rotate(query, a) * rotate(key, b)).sum())

    assert product(3, 1) == pytest.approx(product(12, 10), rel=1e-6)
    assert product(3, 1) != pytest.approx(product(3, 2), rel=1e-3)


def test_embedding_gradient_is_shrunk_and_values_are_not() -> None:
    sample = _worked_example()
    batch = [torch.from_numpy(array)[None] for array in (sample.input_ids, sample.position_ids)]
    results = []
    for alpha in (1.0, 0.1):
        torch.manual_seed(0)
        model = GLM(GLMConfig(128, 1, 16, 2, 24, embedding_gradient_alpha=alpha)).double()
        # Untie by hand: read the input embeddings' own gradient through a hook.
        captured = []
        model.word_embeddings.register_forward_hook(
            lambda *_args, c=captured: c.append(_args[2]) or _args[2].retain_grad()
        )
        loss = model(*batch, torch.tensor([5]), torch.from_numpy(sample.labels)[None])
        loss.backward()
        results.append((loss.item(), captured[0].grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    torch.testing.assert_close(results[1][1], results[0][1] * 0.1)


def test_scaled_queries_survive_low_precision() -> None:
    """Layer scaling leaves the function as it is: fp64 with and without agree."""
    torch.manual_seed(0)
    model = GLM(GLMConfig(128, 3, 16, 2, 24)).double()
    sample = _worked_example()
    batch = [torch.from_numpy(array)[None] for array in (sample.input_ids, sample.position_ids)]
    scaled = model(*batch, torch.tensor([5]))
    for layer in model.layers:
        layer.attention.scale = 1.0
    torch.testing.assert_close(model(*batch, torch.tensor([5])), scaled, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sizes", [(10, 3, 4), (12, 4, 4)])
def test_impossible_heads_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="divisible"):
        GLMConfig(128, 1, sizes[0], sizes[1], 8)
