"""Aligned mode: the same bits in every stage and for every split of a batch, dropout on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import xtrain
from tests import toys, training
from tests.parity.cases import load_script
from tests.parity.corpus import write_corpus
from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.comm import tree_sum
from xtrain.reproducible.aligned_random import philox4x32, random_words

SIZES = ["--num-layers=2", "--hidden-size=32", "--num-heads=4", "--ffn-size=64", "--vocab-size=300"]


def _glm(folder: str, stage: int, dtype: str, micro: int, steps: int) -> list[str]:
    """The example script's own training loop, aligned, with dropout; exact losses."""
    script = load_script("xtrain")
    corpus = str(Path(folder) / "corpus.txt")
    args = script.parse_args(
        [*SIZES, "--data-path", corpus, "--seq-length=32", "--dropout=0.1", "--aligned-init"]
    )
    model = script.build_model(args)
    engine, _, _, _ = xtrain.initialize(
        model=model,
        model_parameters=script.build_param_groups(model, 0.01),
        config={
            "train_batch_size": 4 * micro,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": dtype == "bf16"},
            "zero_optimization": training.zero(stage, 100, reduce_bucket_size=5000),
            "optimizer": {"type": "AdamW", "params": {"lr": 2e-3}},
            "xtrain": {"aligned": True},
        },
    )
    mpu, sampler = script.DataParallelUnit(), script.build_sampler(args)
    return [script.train_step(engine, sampler, mpu, step).hex() for step in range(steps)]


@pytest.mark.bits
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stages_and_splits_give_the_same_bits(ranks: Any, tmp_path: Path, dtype: str) -> None:
    """1 x 4, 2 x 2 and 4 x 1 (ranks x accumulation) in all stages, one hundred steps each; ten with the kernels of
    another processor (test_processors.py)."""
    write_corpus(tmp_path, 200)
    steps = 10 if "ATEN_CPU_CAPABILITY" in os.environ else 100
    reference = ranks(1, _glm, str(tmp_path), 0, dtype, 2, steps)[0]
    assert len(set(reference)) == steps
    for world, stage in [(ranks_, stage) for ranks_ in (2, 4) for stage in (0, 1, 2, 3)]:
        assert ranks(world, _glm, str(tmp_path), stage, dtype, 2, steps)[0] == reference, (world, stage)


def test_without_aligned_mode_bf16_splits_differ(ranks: Any) -> None:
    """The test above can fail: plain sums of bf16 gradients depend on the split."""
    curves = [ranks(n, training.train, training.config(1, 4, bf16=True))[0]["losses"] for n in (1, 4)]
    assert curves[0] != curves[1]


def test_canonical_sums_against_the_tree_written_out(ranks: Any) -> None:
    for n in (2, 3, 4):
        rows = [torch.randn(24, generator=torch.Generator().manual_seed(r)) for r in range(n)]
        if n == 2:
            expected = rows[0] + rows[1]
        elif n == 3:
            expected = (rows[0] + rows[1]) + rows[2]
        else:
            expected = (rows[0] + rows[1]) + (rows[2] + rows[3])
        for rank, (part, whole, sent) in enumerate(ranks(n, _canonical)):
            width = 24 // n
            assert torch.equal(part, expected[rank * width :][:width])
            assert torch.equal(whole, expected[:23])
            # A reduce-scatter of 24 elements, and an all-reduce of 23 padded to a multiple of the ranks.
            assert sent == (24 + 2 * (-(-23 // n) * n)) * 4 * (n - 1) / n


def _canonical() -> tuple[torch.Tensor, torch.Tensor, float]:
    mine = torch.randn(24, generator=torch.Generator().manual_seed(xtrain.comm.get_rank()))
    part = xtrain.comm.CanonicalReduceScatter(mine, None).wait().clone()
    whole = xtrain.comm.CanonicalAllReduce(mine[:23], None).wait().clone()
    return part, whole, float(xtrain.comm.ledger.sent_bytes())


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=17))
def test_the_tree_adds_everything(values: list[int]) -> None:
    assert tree_sum([torch.tensor([float(v)]) for v in values]).item() == sum(values)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known answers for philox4x32-10
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_against_its_published_vectors(
    counter: list[int], key: tuple[int, int], words: list[int]
) -> None:
    assert [int(word) for word in philox4x32([torch.tensor([c]) for c in counter], key)] == words


def test_words_are_uniform_and_depend_on_every_coordinate() -> None:
    words = random_words(100_000, 7, (1, 2, 3), torch.device("cpu")).numpy()
    counts = np.histogram(words, bins=16, range=(0, 2**32))[0]
    assert ((counts - 6250) ** 2 / 6250).sum() < 45  # chi-square, 15 degrees of freedom, p about 1e-4
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert (random_words(1000, 7, other, torch.device("cpu")).numpy() != words[:1000]).mean() > 0.99
    assert (random_words(1000, 8, (1, 2, 3), torch.device("cpu")).numpy() != words[:1000]).mean() > 0.99


def _random(kind: str) -> Any:
    class Random(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.weight, self.kind = nn.Parameter(torch.ones(1000)), kind
            if kind == "heads":
                self.layer: nn.Module = nn.MultiheadAttention(100, 2, dropout=0.1)
            elif kind == "recurrent":
                self.layer = nn.GRU(100, 2, num_layers=2, dropout=0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.kind == "dropout":
                return nn.functional.dropout(x * self.weight, 0.25, self.training)
            if self.kind == "heads":
                return self.layer(*[(x * self.weight).view(5, 2, 100)] * 3)[0]
            if self.kind == "recurrent":
                return self.layer((x * self.weight).view(5, 2, 100))[0]
            if self.kind == "attention":
                q = x.view(1, 1, 10, 100) * self.weight.view(1, 1, 10, 100)
                return nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
            return x * self.weight + torch.rand_like(x)

    settings = training.config(0, 8, xtrain={"aligned": True})
    engine, _, _, _ = xtrain.initialize(model=Random(kind), config=settings)
    x = torch.ones(1000)
    if kind != "dropout":
        with pytest.raises(NotImplementedYetError) as caught:
            engine(x)
        return str(caught.value)
    first = engine(x)
    engine.eval()
    untouched = torch.equal(engine(x), x)
    engine.train()
    return first.detach(), untouched, x.requires_grad


def test_dropout_is_replaced_and_other_randomness_refused(ranks: Any) -> None:
    (first, untouched, _), (other, _, _) = ranks(2, _random, "dropout")
    assert untouched
    kept = first[first != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / 0.75))
    assert 0.70 < len(kept) / 1000 < 0.80
    assert not torch.equal(first, other)  # two slots
    assert "rand_like" in ranks(1, _random, "rand")[0]
    assert "scaled_dot_product_attention" in ranks(1, _random, "attention")[0]
    assert "MultiheadAttention" in ranks(1, _random, "heads")[0]
    assert "nn.GRU" in ranks(1, _random, "recurrent")[0]


def _plain(function: Any, *args: Any) -> Any:
    return function(*args)


def _torch_reentrant(function: Any, *args: Any) -> Any:
    return torch_checkpoint(function, *args, use_reentrant=True)


def _torch_not_reentrant(function: Any, *args: Any) -> Any:
    return torch_checkpoint(function, *args, use_reentrant=False)


CHECKPOINTS = (
    _plain,
    _torch_reentrant,
    _torch_not_reentrant,
    xtrain.checkpointing.checkpoint,
    xtrain.checkpointing.non_reentrant_checkpoint,
)


def _checkpointed(which: int, own_backward: bool) -> tuple[list[float], bool]:
    class Checkpointed(nn.Module):
        """Dropout in a layer, in a plain function, outside of any checkpoint, and in a checkpoint in a checkpoint."""

        def __init__(self, run: Any) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(toys.FEATURES, toys.FEATURES) for _ in range(4))
            self.out, self.run = nn.Linear(toys.FEATURES, toys.OUTPUTS), run

        def _inner(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(torch.tanh(self.layers[1](x)), 0.5)

        def _outer(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.dropout(torch.tanh(self.layers[0](x)), 0.5)
            return self.run(self._inner, x) + nn.functional.dropout(x, 0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[2](x)
            x = nn.functional.dropout(self.run(self._outer, x), 0.2)
            return self.out(self.run(lambda y: nn.functional.dropout(self.layers[3](y), 0.3), x))

    torch.manual_seed(0)
    untouched = torch.utils.checkpoint.CheckpointFunction
    engine = xtrain.initialize(
        model=Checkpointed(CHECKPOINTS[which]), config=training.config(1, micro=4, xtrain={"aligned": True})
    )[0]
    losses = []
    for step in range(5):  # the learning rate is zero in the first two
        x, y = training.samples(step)
        accumulation = engine.gradient_accumulation_steps()
        for index in range(accumulation):
            first = (engine.grid.rank * accumulation + index) * 4
            loss = training.loss_of(engine, x[first : first + 4], y[first : first + 4])
            if own_backward:
                loss.backward()
            else:
                engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses, torch.utils.checkpoint.CheckpointFunction is untouched


@pytest.mark.bits
@pytest.mark.parametrize("own_backward", [False, True])
def test_recomputation_draws_the_same_masks(ranks: Any, own_backward: bool) -> None:
    """A different mask in backward would give different gradients, and different losses from step 2 on."""
    for world in (1, 2):
        curves = [ranks(world, _checkpointed, i, own_backward)[0] for i in range(len(CHECKPOINTS))]
        for (losses, restored), run in zip(curves, CHECKPOINTS, strict=True):
            assert losses == curves[0][0], run
            assert restored


def _contradiction() -> str:
    settings = training.config(1, communication_data_type="bf16", xtrain={"aligned": True})
    with pytest.raises(ConfigError) as caught:
        xtrain.initialize(model=training.build_model(), config=settings)
    return str(caught.value)


def test_a_contradicting_dtype_is_refused(ranks: Any) -> None:
    assert "communication_data_type" in ranks(1, _contradiction)[0]
