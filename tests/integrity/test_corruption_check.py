"""The check for silent data corruption: what it finds, whom it names, and that it is quiet otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xtrain
from tests import toys, training
from xtrain import comm
from xtrain.base.errors import ConfigError, NotImplementedYetError, TrainingError
from xtrain.config import load_config
from xtrain.integrity.checksum import checksum
from xtrain.integrity.corruption_check import culprits

QUICK = settings(max_examples=50, deadline=None)


@QUICK
@given(
    st.integers(1, 70_000),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    st.data(),
)
def test_every_flipped_bit_changes_the_checksum(size: int, dtype: torch.dtype, data: Any) -> None:
    x = torch.linspace(-3, 3, size).to(dtype)
    before = checksum(x).item()
    octets = x.view(torch.uint8)
    place, bit = data.draw(st.integers(0, octets.numel() - 1)), data.draw(st.integers(0, 7))
    octets[place] ^= 1 << bit
    assert checksum(x).item() != before
    octets[place] ^= 1 << bit
    assert checksum(x).item() == before


def test_the_place_of_a_number_counts() -> None:
    x = torch.arange(300_000, dtype=torch.float64)
    swapped = x.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    chunks = x.clone().view(-1)
    chunks[:65536], chunks[65536:131072] = x[65536:131072], x[:65536]
    assert len({checksum(x).item(), checksum(swapped).item(), checksum(chunks).item()}) == 3
    assert checksum(torch.zeros(0)).item() == 0
    assert checksum(x[1::2]).item() == checksum(x[1::2].clone()).item()
    odd = torch.arange(7.0)[1:]
    assert checksum(odd).item() == checksum(odd.clone()).item()


@QUICK
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_the_majority_is_right(digests: list[int]) -> None:
    wrong, undecided = culprits(digests)
    best = max(digests.count(value) for value in digests)
    if 2 * best > len(digests):
        right = next(value for value in digests if digests.count(value) == best)
        assert wrong == [i for i, value in enumerate(digests) if value != right]
        assert undecided == []
    else:
        assert wrong == []
        assert undecided == list(range(len(digests)))


def _run(stage: int, fault: dict[str, Any] | None, sdc: dict[str, Any], more: dict[str, Any]) -> Any:
    """Four steps under the check; the error, or what was sent for the check in all of them."""
    section = {"backend": "fake", "sdc_check": sdc, "fake": {"faults": [fault] if fault else []}}
    size = comm.get_world_size()
    config = {**training.config(stage, micro=4 if size < 3 else 1), **more, "xtrain": section}
    if size == 3:
        config.pop("train_batch_size")
        config["gradient_accumulation_steps"] = 1
    engine = xtrain.initialize(model=training.build_model(), config=config)[0]
    comm.ledger.reset()
    try:
        for step in range(4):
            training.engine_step(engine, step)
    except TrainingError as error:
        return str(error)
    finally:
        engine.destroy()
    return "quiet"


FLIP = {"kind": "bit_flip", "step": 2, "bit": 3, "name": "second.weight", "element": 20}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_rank_and_the_parameter_are_named(ranks: Any, stage: int) -> None:
    messages = ranks(3, _run, stage, {**FLIP, "rank": 1}, {"every": 2}, {})
    assert len(set(messages)) == 1
    assert "step 2: silent data corruption" in messages[0]
    assert "parameter 'second.weight' on rank 1 is not that of the 2 other ranks" in messages[0]
    assert "\n" not in messages[0]


def test_two_ranks_cannot_outvote_each_other(ranks: Any) -> None:
    messages = ranks(2, _run, 0, {**FLIP, "rank": 1}, {"every": 1, "own_states": False}, {})
    assert len(set(messages)) == 1
    assert (
        "'second.weight' is not the same on ranks 0, 1, and no majority tells which is right" in messages[0]
    )


def test_a_change_of_what_one_rank_has_is_named(ranks: Any) -> None:
    # In stage 3 rank 1 has the last elements of the matrix, and nobody else has.
    messages = ranks(2, _run, 3, {**FLIP, "rank": 1, "element": 160}, {"every": 1}, {})
    assert len(set(messages)) == 1
    assert "rank 1: parameter 'second.weight' changed between two updates" in messages[0]


def test_unmanaged_accumulation_is_checked_at_every_step(ranks: Any) -> None:
    more = {"managed_gradient_accumulation": False}
    messages = ranks(3, _run, 0, {**FLIP, "rank": 1}, {"every": 2}, more)
    assert "parameter 'second.weight' on rank 1 is not that of the 2 other ranks" in messages[0]


@pytest.mark.bits
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_it_is_quiet_otherwise(ranks: Any, stage: int) -> None:
    offload = {"zero_optimization": training.zero(stage, offload_optimizer={"device": "cpu"})}
    cases: list[dict[str, Any]] = [{}, {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}]
    for more in [*cases, *([offload] if stage else [])]:
        assert ranks(2, _run, stage, None, {"every": 1}, more) == ["quiet", "quiet"]


def test_a_warning_goes_on_and_rare_checks_miss_what_heals(ranks: Any) -> None:
    warn = {"every": 1, "on_mismatch": "warn"}
    assert ranks(2, _run, 0, {**FLIP, "rank": 1}, warn, {}) == ["quiet", "quiet"]
    # Checked at step 3 only; in stage 1 the all-gather of step 2 has healed what rank 0 owns.
    healed = {**FLIP, "rank": 1, "name": "second.bias", "element": 0}
    assert ranks(2, _run, 1, healed, {"every": 3}, {}) == ["quiet", "quiet"]


def _traffic() -> float:
    totals = []
    for sdc in ({}, {"sdc_check": {"every": 2}}):
        config = {**training.config(1), "xtrain": sdc}
        engine = xtrain.initialize(model=training.build_model(), config=config)[0]
        comm.ledger.reset()
        for step in range(4):
            training.engine_step(engine, step)
        totals.append(float(comm.ledger.sent_bytes("all_gather")))
        engine.destroy()
    return totals[1] - totals[0]


def test_a_check_sends_two_integers(ranks: Any) -> None:
    assert ranks(2, _traffic) == [2 * 16, 2 * 16]


def _resumed(folder: str) -> str:
    config = {**training.config(1), "xtrain": {"sdc_check": {"every": 1}}}
    engine = xtrain.initialize(model=training.build_model(), config=config)[0]
    training.engine_step(engine, 0)
    engine.save_checkpoint(folder)
    training.engine_step(engine, 1)
    engine.load_checkpoint(folder)
    training.engine_step(engine, 1)
    training.engine_step(engine, 2)
    engine.destroy()
    return "quiet"


def test_a_checkpoint_that_is_loaded_is_no_corruption(ranks: Any, tmp_path: Any) -> None:
    assert ranks(2, _resumed, str(tmp_path)) == ["quiet", "quiet"]


# ---------------------------------------------------------------- a neighbour computes again


def _recomputed(
    stage: int, faults: list[dict[str, Any]], precision: dict[str, Any], odd: bool = False
) -> Any:
    """Three steps with every step's first micro-batch computed again; the error, or weights and statistics."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        section = {"aligned": True, "sdc_check": {"every": 1, "recompute": recompute}, "backend": "fake"}
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "zero_optimization": training.zero(stage),
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            **precision,
            "xtrain": {**section, "fake": {"faults": faults if recompute else []}},
        }
        engine = xtrain.initialize(model=toys.SeveralOutputs(), config=config)[0]
        dtype = engine.module.first.weight.dtype
        try:
            for step in range(3):
                for micro in range(2):
                    x, y = (torch.cat([t, t, t]) for t in training.samples(step))
                    start = (2 * engine.grid.rank + micro) * 4 + odd
                    # A slice that begins anywhere, where kernels round otherwise.
                    got = engine(x.to(dtype)[start : start + 4], scale=0.5)
                    difference = got["out"].float() - y[start : start + 4].float()
                    engine.backward(difference.square().mean() + 0.01 * got["mean"].float())
                    engine.step()
        except TrainingError as error:
            engine.destroy()
            return str(error)
        state = engine.module.state_dict()
        results.append({name: value.clone() for name, value in state.items()})
        engine.destroy()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    return "quiet"


@pytest.mark.bits
@pytest.mark.parametrize("size", [1, 2, 3])
def test_recomputing_agrees_and_changes_nothing(ranks: Any, size: int) -> None:
    half: dict[str, Any] = {"bf16": {"enabled": True}, "data_types": {"buffer_dtype": "bf16"}}
    scaled: dict[str, Any] = {"fp16": {"enabled": True}, "data_types": {"buffer_dtype": "fp16"}}
    for stage, precision in ((0, {}), (1, half), (2, scaled)):
        assert ranks(size, _recomputed, stage, [], precision, True) == ["quiet"] * size


def test_a_wrong_gradient_is_found_by_the_neighbour(ranks: Any) -> None:
    fault = {**FLIP, "rank": 1, "target": "gradient", "bit": 12}
    messages = ranks(3, _recomputed, 1, [fault], {})
    assert len(set(messages)) == 1
    assert (
        "step 2: silent data corruption: the first micro-batch of rank 1, computed again on rank 0, has another "
        "gradient of parameter 'second.weight':"
    ) in messages[0]


def test_a_wrong_activation_is_found_and_named(ranks: Any) -> None:
    fault = {**FLIP, "rank": 2, "target": "activation", "name": "norm", "bit": 22}
    messages = ranks(3, _recomputed, 2, [fault], {})
    assert len(set(messages)) == 1
    assert "the first micro-batch of rank 2, computed again on rank 1, has another output" in messages[0]
    (message,) = ranks(1, _recomputed, 0, [{**fault, "rank": 0}], {})
    assert "rank 0, computed again on rank 0, has another output" in message


def test_a_rank_with_a_wrong_weight_is_in_both(ranks: Any) -> None:
    messages = ranks(3, _recomputed, 0, [{**FLIP, "rank": 1, "bit": 22}], {})
    assert "rank 1 is in both" in messages[0]
    assert "on rank 1 is not that of the 2 other ranks" in messages[0]


@pytest.mark.parametrize(
    ("section", "stage", "kind", "said"),
    [
        ({}, 1, ConfigError, "which need 'xtrain.aligned'"),
        ({"aligned": True}, 3, NotImplementedYetError, "in ZeRO stage 3"),
    ],
)
def test_recomputing_says_what_it_needs(section: dict[str, Any], stage: int, kind: Any, said: str) -> None:
    config = {"train_batch_size": 1, "zero_optimization": {"stage": stage}}
    with pytest.raises(kind, match=said):
        load_config({**config, "xtrain": {**section, "sdc_check": {"recompute": True}}})
