"""Values that the configuration takes and refuses, keys that it ignores, and any JSON at all."""

from __future__ import annotations

import base64
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xtrain.base.errors import ConfigError, NotImplementedYetError, XtrainError
from xtrain.config import load_config
from xtrain.config.schema import Config
from xtrain.config.unknown import keys, section_model
from xtrain.optim import build_optimizer
from xtrain.optim import schedules as schedulers

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF, True, False, "nan", "inf"])
@pytest.mark.parametrize(
    "path",
    [
        "gradient_clipping",
        "gradient_predivide_factor",
        "fp16.loss_scale",
        "fp16.min_loss_scale",
        "fp16.loss_scale_window",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "zero_optimization.stage",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.offload_optimizer.ratio",
        "zero_optimization.offload_optimizer.buffer_count",
        "flops_profiler.recompute_fwd_factor",
        "activation_checkpointing.number_checkpoints",
        "xtrain.max_skipped_steps",
        "xtrain.fake.cost.latency",
        "xtrain.record.modules_every",
    ],
)
def test_a_number_is_finite_and_no_truth_value(path: str, value: Any) -> None:
    config = value
    for part in reversed(path.split(".")):
        config = {part: config}
    with pytest.raises(ConfigError, match=f"'{path}' is "):
        load_config(config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"train_micro_batch_size_per_gpu": 10**30}, "'train_micro_batch_size_per_gpu' is 1000"),
        ({"train_batch_size": 10**5000}, "'train_batch_size' is a number of thousands of digits"),
        ({"xtrain": {"seed": 2**70}}, "'xtrain.seed'"),
        ({"fp16": {"enabled": True, "min_loss_scale": 0}}, "min_loss_scale must be positive"),
        ({"fp16": {"enabled": True, "min_loss_scale": -1}}, "min_loss_scale must be positive"),
        ({"fp16": {"enabled": True, "min_loss_scale": 0.5}}, "'fp16.min_loss_scale' is 0.5"),
        ({"fp16": {"enabled": True, "loss_scale_window": 0}}, "loss_scale_window must be positive"),
        ({"fp16": {"enabled": True, "initial_scale_power": 2000}}, "initial_scale_power must be between"),
        ({"fp16": {"enabled": True, "loss_scale": 1e300}}, "loss_scale must be at most"),
        ({"torch_autocast": {"enabled": True, "dtype": "torch.float64"}}, "'torch_autocast.dtype'"),
    ],
)
def test_values_out_of_range(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(config)


def test_numbers_as_people_write_them() -> None:
    """1e9 is a float in JSON, and a numeral in quotation marks is read where DeepSpeed reads it."""
    zero = '{"stage": 3.0, "reduce_bucket_size": 5e8, "sub_group_size": "1000"}'
    values = load_config(json.loads(f'{{"zero_optimization": {zero}, "steps_per_print": 1e3}}')).values
    assert values.zero_optimization.stage == 3
    assert values.zero_optimization.reduce_bucket_size == 500_000_000
    assert values.zero_optimization.sub_group_size == 1000
    assert values.steps_per_print == 1000
    static = load_config({"fp16": {"enabled": True, "loss_scale": 128, "min_loss_scale": 0}}).values
    assert static.fp16.loss_scale == 128


def test_a_dtype_object_is_a_dtype() -> None:
    values = load_config({"torch_autocast": {"enabled": True, "dtype": torch.float16}}).values
    assert values.torch_autocast.dtype == "float16"


@pytest.mark.parametrize(
    "section",
    [
        {"fp16": {"enabled": False, "loss_scale_window": 0, "min_loss_scale": -3, "hysteresis": 0}},
        {"fp16": {"enabled": False, "initial_scale_power": 2000, "loss_scale": 1e300}},
        {"flops_profiler": {"enabled": False, "profile_step": -1}},
        {"flops_profiler": {"enabled": False, "profile_step": None, "detailed": "perhaps"}},
        {"torch_autocast": {"enabled": False, "dtype": "fp8", "lower_precision_safe_modules": [1]}},
        {"comet": {"enabled": False, "mode": "sometimes", "samples_log_interval": -1}},
    ],
)
def test_wrong_values_in_a_section_that_is_off_do_not_matter(section: dict[str, Any]) -> None:
    checked = load_config({"train_batch_size": 1, **section})
    name = next(iter(section))
    assert not getattr(checked.values, name).enabled
    on = {name: {**section[name], "enabled": True}}
    with pytest.raises(ConfigError):
        load_config(on)


def test_a_wrong_value_that_is_left_out_is_said() -> None:
    notices = load_config({"torch_autocast": {"enabled": False, "dtype": "fp8"}}).notices
    assert len(notices) == 1
    assert "'torch_autocast.dtype' is 'fp8'" in notices[0]
    with pytest.raises(ConfigError, match=r"fp16\.enabled"):
        load_config({"fp16": {"enabled": "perhaps"}})
    with pytest.raises(ConfigError, match=r"'fp16\.loss_scale' is True"):  # as in DeepSpeed
        load_config({"fp16": {"enabled": False, "loss_scale": True}})


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"cuda_visible_devices": 0}, ["'cuda_visible_devices'"]),
        ({"_comment": "mine", "comment": "mine"}, ["'_comment'", "'comment'"]),
        ({"monitor_config": {"enabled": True}, "comms_config": {}}, ["'monitor_config'", "'comms_config'"]),
        (
            {"flops_profiler": {"colour": 1}, "timers": {"wheel": 2}},
            ["'flops_profiler.colour'", "'timers.wheel'"],
        ),
        ({"zero_optimization.reduce_bucket_size": 589824.0}, ["'zero_optimization.reduce_bucket_size'"]),
    ],
)
def test_keys_that_nobody_reads_are_ignored_with_one_warning(
    config: dict[str, Any], names: list[str]
) -> None:
    checked = load_config({"train_batch_size": 1, **config})
    (warning,) = checked.warnings
    assert all(name in warning for name in names)
    assert checked.values.zero_optimization.reduce_bucket_size is None
    assert checked.values.train_batch_size == 1


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16"])
def test_old_spellings(spelling: str) -> None:
    assert load_config({spelling: {"enabled": True}}).values.bf16.enabled
    both = {"bf16": {"enabled": True}, "bfloat16": {"enabled": False}}
    assert load_config(both).values.bf16.enabled  # as in DeepSpeed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"zero_optimization": ' * 5000 + "1" + "}" * 5000, "nested too deep"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
        ('{"train_batch_size": ' + "1" * 5000 + "}", "digits"),
        ('{"train_batch_size": 1e400}', "'train_batch_size' is inf"),
        ('{"gradient_clipping": 1e400}', "'gradient_clipping' is inf"),
        ('{"gradient_clipping": NaN}', "'gradient_clipping' is nan"),
    ],
)
def test_json_that_breaks_readers(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    packed = base64.urlsafe_b64encode(text.encode()).decode()
    for source in (path, packed):
        with pytest.raises(ConfigError, match=said) as caught:
            load_config(source)
        assert "\n" not in str(caught.value)


def test_a_dictionary_that_holds_itself() -> None:
    config: dict[str, Any] = {"autotuning": {}}
    config["autotuning"]["again"] = config
    with pytest.raises(ConfigError, match="nested too deep"):
        load_config(config)


NUMBERS = st.integers() | st.floats() | st.sampled_from([10**30, 10**400, -(10**30), 2**63, 1e308, 0, 1, 0.1])
WORDS = st.sampled_from(
    ["auto", "bf16", "torch.half", "cpu", "1e-5", "nan", "true", "none", "Adam", "WarmupLR"]
)
ANY = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = {name: model for name in keys(Config) if (model := section_model((name,))) is not None}
OPTIMIZERS = [
    "Adam",
    "AdamW",
    "Lamb",
    "Lion",
    "Muon",
    "SGD",
    "Adagrad",
    "Adafactor",
    "NAdam",
    "Rprop",
    "other",
]
OPTIONS = [
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "momentum",
    "amsgrad",
    "adam_w_mode",
    "torch_adam",
    "foreach",
]
OPTIONS += ["nesterov", "muon_lr", "ns_steps", "ns_method", "max_coeff", "min_coeff"]


def _refusal(build: Callable[[], Any]) -> str:
    """The sentence with which something is refused; "" if it is not."""
    try:
        build()
    except XtrainError as error:
        return str(error)
    return ""


@given(
    st.dictionaries(st.sampled_from(keys(Config)) | st.text(max_size=10), ANY, max_size=4)
    | st.one_of(
        st.fixed_dictionaries({name: st.dictionaries(st.sampled_from(keys(model)), ANY, max_size=4)})
        for name, model in SECTIONS.items()
    )
)
def test_any_value_is_accepted_or_refused_in_one_sentence(config: dict[str, Any]) -> None:
    """Anything else than an XtrainError is a failure of the test."""
    said = _refusal(lambda: load_config(config))
    assert said.startswith("config: ") or not said
    assert "\n" not in said


POOR = ("not supported between", "object is not", "NoneType", "unsupported operand")


@given(st.sampled_from(OPTIMIZERS), st.dictionaries(st.sampled_from(OPTIONS), ANY, max_size=4))
def test_any_options_of_an_optimizer(kind: str, params: dict[str, Any]) -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}]

    def build() -> None:
        values = load_config({"optimizer": {"type": kind, "params": params}}).values
        assert values.optimizer is not None
        build_optimizer(values.optimizer, groups)

    assert not any(words in _refusal(build) for words in ("\n", *POOR))


@given(st.sampled_from(sorted(schedulers._TYPES)), st.data())
def test_any_options_of_a_schedule(kind: str, data: st.DataObject) -> None:
    names = list(inspect.signature(schedulers._TYPES[kind]).parameters)[1:]
    params = data.draw(st.dictionaries(st.sampled_from(names), ANY | NUMBERS, max_size=4))
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])

    def build() -> None:
        values = load_config({"scheduler": {"type": kind, "params": params}}).values
        assert values.scheduler is not None
        schedulers.build_scheduler(values.scheduler, optimizer)

    assert not any(words in _refusal(build) for words in ("\n", *POOR))


def test_a_section_that_turns_a_feature_on_by_being_there_is_refused_empty() -> None:
    """DeepSpeed trains with ZenFlow when the section is given at all: to accept `{}` would be another optimizer."""
    with pytest.raises(NotImplementedYetError, match=r"zero_optimization\.zenflow"):
        load_config({"train_batch_size": 1, "zero_optimization": {"stage": 2, "zenflow": {}}})
    assert load_config({"train_batch_size": 1, "zero_optimization": {"stage": 2, "zenflow": None}})
