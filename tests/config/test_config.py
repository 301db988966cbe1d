"""Reading the configuration: what is accepted, refused or reported, and how mistakes are told."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtrain.config import load_config, solve_batch_sizes
from xtrain.config.document import document
from xtrain.config.load import _keys
from xtrain.config.schema import Config
from xtrain.errors import ConfigError, NotImplementedYetError, XtrainError

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"train_batch_siz": 8}, "unknown key 'train_batch_siz': did you mean 'train_batch_size'?"),
        (
            {"zero_optimization": {"stge": 1}},
            "unknown key 'stge' in section 'zero_optimization': did you mean 'stage'?",
        ),
        ({"stage": 1}, "the key is 'zero_optimization.stage'"),
        ({"zero_optimization": {"gradient_clipping": 1.0}}, "the key is 'gradient_clipping'"),
        ({"qwertyuiop": 1}, "see docs/config.md"),
        ({"optimizer": {"params": {}}}, "'optimizer.type' is missing"),
        ({"gradient_clipping": "high"}, "'gradient_clipping' is 'high'"),
        ({"gradient_clipping": -1}, "'gradient_clipping' is -1"),
        ({"zero_optimization": {"stage": 7}}, "'zero_optimization.stage' is 7"),
    ],
)
def test_mistakes_name_the_key_and_what_to_do(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"fp16": {"enabled": True, "auto_cast": True}},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
        {"data_efficiency": {"enabled": True}},
        {"autotuning": {"enabled": True}},
    ],
)
def test_features_not_there_yet_are_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedYetError) as caught:
        load_config(config)
    key = next(iter(config))
    assert key in str(caught.value)
    assert "not there yet" in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"fp16": {"enabled": False, "loss_scale_window": 500}},
        {"flops_profiler": {"enabled": False}, "tensorboard": {}},
        {"zero_optimization": {"stage": 1, "overlap_comm": True, "offload_param": None}},
        {"prescale_gradients": False, "gradient_predivide_factor": 1.0},
        {"bfloat16": {"enabled": True}},
        {"zero_optimization": {"cpu_offload": False, "offload_optimizer": {"device": "none"}}},
        {"activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False}},
        {"fp16": {"enabled": False, "auto_cast": True}, "communication_data_type": "fp32"},
        {"zero_optimization": True},
    ],
)
def test_features_that_are_off_are_accepted_in_silence(config: dict[str, Any]) -> None:
    assert load_config(config).notices == []


def test_keys_without_effect_are_reported() -> None:
    notices = load_config(
        {"zero_optimization": {"stage3_max_live_parameters": 5, "contiguous_gradients": False}}
    ).notices
    assert len(notices) == 2
    assert "zero_optimization.stage3_max_live_parameters" in notices[1]
    assert all("no effect: " in notice for notice in notices)


def test_infinitely_many_steps_between_prints_is_never() -> None:
    assert (
        load_config({"train_batch_size": 1, "steps_per_print": float("inf")}).values.steps_per_print is None
    )


def test_auto_means_left_out() -> None:
    values = load_config(
        {"train_batch_size": "auto", "zero_optimization": {"reduce_bucket_size": "auto"}}
    ).values
    assert values.train_batch_size is None
    assert values.zero_optimization.reduce_bucket_size is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: Any, said: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(_keys(Config)) | st.text(max_size=10), JSON, max_size=4))
def test_any_json_is_accepted_or_refused_in_one_sentence(config: dict[str, Any]) -> None:
    with suppress(XtrainError):
        load_config(json.loads(json.dumps(config)))
        return
    with pytest.raises(XtrainError, match=r"^config: [^\n]*$"):
        load_config(json.loads(json.dumps(config)))


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 16))
def test_batch_sizes_derive_from_any_two(micro: int, accumulation: int, ranks: int) -> None:
    train = micro * accumulation * ranks
    expected = (train, micro, accumulation)
    assert solve_batch_sizes(train, micro, None, ranks) == expected
    assert solve_batch_sizes(train, None, accumulation, ranks) == expected
    assert solve_batch_sizes(None, micro, accumulation, ranks) == expected
    assert solve_batch_sizes(train, micro, accumulation, ranks) == expected


@given(st.integers(1, 100), st.integers(1, 10), st.integers(1, 10))
def test_a_remainder_is_an_error(train: int, micro: int, ranks: int) -> None:
    if train % (micro * ranks):
        with pytest.raises(ConfigError, match=f"not divisible by .* = {micro * ranks}"):
            solve_batch_sizes(train, micro, None, ranks)
    else:
        assert solve_batch_sizes(train, micro, None, ranks).accumulation == train // (micro * ranks)


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ((None, None, None, 2), "neither"),
        ((8, 2, 3, 2), "leave one of the three out"),
        ((0, None, None, 1), "at least 1"),
    ],
)
def test_batch_size_mistakes(given_: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        solve_batch_sizes(*given_)


def test_the_reference_page_is_current() -> None:
    assert (DOCS / "config.md").read_text() == document(), "run `make docs`"


@pytest.mark.deepspeed
def test_every_deepspeed_zero_key_is_known() -> None:
    """Against the installed DeepSpeed's own model: nothing a user may write is unknown here."""
    zero = pytest.importorskip("deepspeed.runtime.zero.config", reason="needs the extra deepspeed")
    ours = set(_keys(Config.model_fields["zero_optimization"].annotation)) | set(
        Config.model_fields["zero_optimization"].annotation.model_fields
    )
    theirs = zero.DeepSpeedZeroConfig.model_fields
    assert {info.alias or name for name, info in theirs.items()} - ours == set()
