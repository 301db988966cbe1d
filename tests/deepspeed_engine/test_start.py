"""`"xtrain": {"engine": "deepspeed"}` against real DeepSpeed called directly, and against xtrain's own engine."""

from __future__ import annotations

import inspect
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import xtrain
from tests import toys, training
from tests.live_deepspeed import fresh_deepspeed, live_deepspeed
from tests.parity.cases import flags, load_script
from tests.parity.corpus import write_corpus
from xtrain.align.record import read_record
from xtrain.backends import Backend, registry
from xtrain.base.errors import BackendError, ConfigError, NotImplementedYetError
from xtrain.config import load_config
from xtrain.deepspeed_engine.start import config_for_deepspeed, deepspeed_for

STEPS = 6


def _config(stage: int, dtype: str, engine: str, **section: Any) -> dict[str, Any]:
    config = training.config(stage, bf16=dtype == "bf16", fp16={"enabled": dtype == "fp16"})
    config["optimizer"]["params"]["torch_adam"] = True  # DeepSpeed would compile its own
    return {**config, "xtrain": {"engine": engine, **section}}


def _train(engine: Any) -> list[float]:
    losses = []
    for step in range(STEPS):
        x, y = training.samples(step)
        micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
        for index in range(accumulation):
            first = (xtrain.comm.get_rank() * accumulation + index) * micro
            loss = training.loss_of(engine, x[first : first + micro], y[first : first + micro])
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def _three_ways(folder: str, stage: int, dtype: str) -> tuple[Any, ...]:
    """Losses of this rank: DeepSpeed called directly, delegated to, and xtrain's engine; the second's record."""
    model = training.build_model()
    with live_deepspeed() as deepspeed:
        config = _config(stage, dtype, "deepspeed")
        del config["xtrain"]
        args = {"model": model, "model_parameters": training.param_groups(model), "config": config}
        direct = _train(deepspeed.initialize(**args)[0])
        deepspeed.accelerator.real_accelerator.ds_accelerator = None
    record = Path(folder) / "record.jsonl"
    with fresh_deepspeed():
        model = training.build_model()
        config = _config(stage, dtype, "deepspeed", record=str(record))
        engine, optimizer, loader, schedule = xtrain.initialize(
            model=model, model_parameters=training.param_groups(model), config=config
        )
        assert isinstance(engine, deepspeed.DeepSpeedEngine)
        assert deepspeed.accelerator.get_accelerator().backend is registry.detect()
        assert (optimizer, loader, schedule) == (engine.optimizer, None, engine.lr_scheduler)
        delegated = _train(engine)
    model = training.build_model()
    native = _train(
        xtrain.initialize(
            model=model,
            model_parameters=training.param_groups(model),
            config=_config(stage, dtype, "native"),
        )[0]
    )
    return direct, delegated, native, deepspeed.__version__


@pytest.mark.deepspeed
@pytest.mark.parametrize(("world", "stage", "dtype"), [
    (1, 0, "fp32"), (2, 0, "bf16"), (1, 1, "fp16"), (2, 1, "fp32"), (2, 2, "bf16"), (2, 3, "fp32"),
])  # fmt: skip
def test_the_delegated_engine_is_deepspeed_to_the_bit(
    ranks: Any, tmp_path: Path, world: int, stage: int, dtype: str
) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    results = ranks(world, _three_ways, str(tmp_path), stage, dtype)
    for direct, delegated, native, _ in results:
        assert delegated == direct
        if dtype == "fp32":
            assert native == pytest.approx(direct, rel=1e-4)
    record = read_record(tmp_path / "record.jsonl")
    header = record.headers[0]
    assert (header["engine"], header["deepspeed"], header["backend"]) == ("deepspeed", results[0][3], "cpu")
    assert header["config"]["xtrain"]["engine"] == "deepspeed"
    micro = len(results[0][1]) // STEPS
    means = [
        sum(sum(losses[step * micro :][:micro]) for _, losses, _, _ in results) / (micro * world)
        for step in range(STEPS)
    ]
    assert list(record.losses().values()) == pytest.approx(means, rel=1e-12)
    # Logarithmic warm-up over four steps, as DeepSpeed counts them.
    rates = [0, 0, math.log(2) / math.log(4), math.log(3) / math.log(4), 1, 1]
    assert list(record.column("lr")) == pytest.approx([0.01 * rate for rate in rates], rel=1e-6)
    if stage > 0:
        assert (record.column("grad_norm")[record.column("applied") > 0] > 0).all()
        assert record.column("loss_scale")[0] == (65536 if dtype == "fp16" else 1)


def _example(folder: str, engine: str, stage: int, dtype: str) -> list[float]:
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
        "xtrain": {"engine": engine},
    }
    path = Path(folder) / f"{engine}-{stage}-{dtype}-{xtrain.comm.get_rank()}.json"
    path.write_text(json.dumps(config))
    sizes = ["--num-layers=2", "--hidden-size=64", "--num-heads=4", "--ffn-size=128", "--vocab-size=512"]
    given = [*flags(Path(folder) / "corpus.txt"), *sizes, "--seq-length=48", "--steps=20"]
    if engine == "native":
        return load_script("xtrain").main([*given, "--deepspeed", "--deepspeed_config", str(path)])
    with fresh_deepspeed():
        return load_script("xtrain").main([*given, "--deepspeed", "--deepspeed_config", str(path)])


@pytest.mark.deepspeed
@pytest.mark.parametrize(("world", "stage", "dtype"), [(1, 0, "fp32"), (2, 1, "fp32"), (2, 1, "bf16")])
def test_the_example_runs_under_both_engines(
    ranks: Any, tmp_path: Path, world: int, stage: int, dtype: str
) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    write_corpus(tmp_path)
    theirs = ranks(world, _example, str(tmp_path), "deepspeed", stage, dtype)[0]
    ours = ranks(world, _example, str(tmp_path), "native", stage, dtype)[0]
    assert len(ours) == len(theirs) == 20
    assert theirs[-1] < theirs[0] - 0.5  # it learns
    assert ours == pytest.approx(theirs, rel=1e-4 if dtype == "fp32" else 0.02)


def _divided(config: dict[str, Any]) -> tuple[list[int], list[float], list[Any]]:
    """Sizes after zero.Init, losses, and a gathered weight's shape and values."""
    with xtrain.zero.Init(config_dict_or_path=config):
        model = training.build_model()
    sizes = [param.numel() for param in model.parameters()]
    engine = xtrain.initialize(model=model, model_parameters=training.param_groups(model), config=config)[0]
    losses = _train(engine)
    with xtrain.zero.GatheredParameters([model.first.weight]):
        weight = model.first.weight.detach().clone()
    return sizes, losses, [list(weight.shape), weight.double().norm().item()]


def _zero_init() -> Any:
    native = _divided(_config(3, "fp32", "native"))
    with fresh_deepspeed():
        theirs = _divided(_config(3, "fp32", "deepspeed"))
    with fresh_deepspeed():
        with xtrain.zero.Init(config_dict_or_path=_config(3, "fp32", "native")):
            model = training.build_model()
        with pytest.raises(ConfigError, match=r"divided by xtrain's zero\.Init"):
            xtrain.initialize(model=model, config=_config(3, "fp32", "deepspeed"))
    return native, theirs


@pytest.mark.deepspeed
def test_zero_init_follows_the_engine(ranks: Any) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    for native, theirs in ranks(2, _zero_init):
        assert native[0] == theirs[0] == [0, 0, 0, 0]
        assert native[1] == pytest.approx(theirs[1], rel=1e-4)
        assert native[2][0] == theirs[2][0] == [33, toys.FEATURES]
        assert native[2][1] == pytest.approx(theirs[2][1], rel=1e-4)


def _helpers(engine: str, stage: int) -> list[list[float]]:
    """Masters and gradients by xtrain.utils: of a step, and after a script has changed the gradient."""

    class Last(torch.nn.Module):
        def __init__(self, given: list[torch.nn.Parameter]) -> None:
            super().__init__()
            self.given = given
            xtrain.zero.register_external_parameter(self, given[0])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.given[0])[:, : toys.OUTPUTS]

    class Tied(torch.nn.Module):
        """The second layer's forward uses the first one's weight, from a list, which is announced."""

        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(toys.FEATURES, 12)
            self.last = Last([self.first.weight])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    model = Tied()
    trained = xtrain.initialize(
        model=model, model_parameters=model.parameters(), config=_config(stage, "bf16", engine)
    )[0]
    x, y = training.samples(0)
    found = []
    for _ in range(2):
        for _ in range(2):
            trained.backward(training.loss_of(trained, x[:4], y[:4]))
            if trained.is_gradient_accumulation_boundary():
                grad = xtrain.utils.safe_get_full_grad(model.first.weight)
                found.append(grad.flatten().tolist())
                xtrain.utils.safe_set_full_grad(model.first.weight, grad * 0 + 0.25)
            trained.step()
        found.append(xtrain.utils.safe_get_full_fp32_param(model.first.weight).flatten().tolist())
        state = xtrain.utils.safe_get_full_optimizer_state(model.first.weight, "exp_avg")
        found.append(state.flatten().tolist())
    return found


def _both_helpers(stage: int) -> Any:
    with fresh_deepspeed():
        theirs = _helpers("deepspeed", stage)
    return _helpers("native", stage), theirs


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_helpers_on_parameters_follow_the_engine(ranks: Any, stage: int) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    for ours, theirs in ranks(2, _both_helpers, stage):
        assert len(ours) == len(theirs) == 6
        for mine, its in zip(ours, theirs, strict=True):
            assert len(mine) == toys.FEATURES * 12
            assert mine == pytest.approx(its, rel=0.02, abs=0.002)


def _pipeline(record: str) -> list[float]:
    """DeepSpeed's own pipeline of two stages, which xtrain's engine does not have."""
    with fresh_deepspeed():
        deepspeed_for(registry.detect())  # a pipeline's layers are divided before initialize
        from deepspeed.pipe import PipelineModule

        torch.manual_seed(0)
        layers = [torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)]
        model = PipelineModule(layers, num_stages=2, loss_fn=torch.nn.MSELoss())
        config = {
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
            "xtrain": {"engine": "deepspeed", "record": record},
        }
        engine = xtrain.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        batches = iter([(x := torch.randn(2, 4), x[:, :3]) for _ in range(8)])
        return [engine.train_batch(data_iter=batches).item() for _ in range(3)]


@pytest.mark.deepspeed
def test_deepspeeds_pipeline_engine_is_recorded(ranks: Any, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    first, second = ranks(2, _pipeline, str(tmp_path / "r.jsonl"))
    assert first == second
    assert list(read_record(tmp_path / "r.jsonl").losses().values()) == first


@pytest.mark.deepspeed
def test_every_abstract_method_of_the_installed_version_is_answered() -> None:
    deepspeed = pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    from deepspeed.accelerator import real_accelerator

    from xtrain.deepspeed_engine.accelerator import BackendAccelerator, present

    before = real_accelerator.ds_accelerator
    try:
        accelerator = present(registry.detect("cpu"), deepspeed)
        assert deepspeed.accelerator.get_accelerator() is accelerator
        theirs = deepspeed.accelerator.cpu_accelerator.CPU_Accelerator()
        base = deepspeed.accelerator.DeepSpeedAccelerator
        assert len(base.__abstractmethods__) > 50
        called = set()
        for name in sorted(base.__abstractmethods__):
            ours = inspect.getattr_static(BackendAccelerator, name)
            assert ours is not inspect.getattr_static(base, name), name
            if not callable(ours) or name in ("capture_to_graph", "replay_graph", "set_rng_state"):
                assert getattr(accelerator, name) is not None
                called.add(name)
                continue
            needed = [
                parameter
                for parameter in inspect.signature(getattr(accelerator, name)).parameters.values()
                if parameter.default is inspect.Parameter.empty
            ]
            if not needed and name != "range_pop":
                getattr(accelerator, name)()
                called.add(name)
        assert len(called) > 50
        for name in ("op_builder_dir", "create_graph", "build_extension"):
            assert getattr(accelerator, name)() == getattr(theirs, name)()
        for name in ("CPUAdamBuilder", "FusedAdamBuilder", "AsyncIOBuilder", "no such builder"):
            assert accelerator.get_op_builder(name) is theirs.get_op_builder(name)
        assert isinstance(
            accelerator.create_op_builder("CPUAdamBuilder"), theirs.get_op_builder("CPUAdamBuilder")
        )
        assert accelerator.create_op_builder("ShareMemCommBuilder") is None
        with accelerator.capture_to_graph(None):
            accelerator.replay_graph(None)
    finally:
        real_accelerator.ds_accelerator = before


@pytest.mark.deepspeed
def test_what_has_no_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed = pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    from abc import abstractmethod

    from xtrain.deepspeed_engine.accelerator import BackendAccelerator, present

    class Newer(deepspeed.accelerator.DeepSpeedAccelerator):  # type: ignore[misc, name-defined]
        @abstractmethod
        def brew(self) -> None: ...

    monkeypatch.setattr(deepspeed.accelerator, "DeepSpeedAccelerator", Newer)
    with pytest.raises(BackendError, match=r"asks its accelerator for brew, which"):
        present(registry.detect("cpu"), deepspeed)

    backend = Backend()
    unknown = BackendAccelerator(backend)
    unknown._name = "tpu"
    with pytest.raises(NotImplementedYetError, match="devices of type 'tpu'"):
        unknown.get_op_builder("FusedAdamBuilder")


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(BackendError, match=r"deepspeed is not installed: pip install 'xtrain\[deepspeed\]'"):
        xtrain.initialize(model=torch.nn.Linear(2, 2), config=_config(0, "fp32", "deepspeed"))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("key", "more"), [
    ("xtrain.aligned", {"xtrain": {"engine": "deepspeed", "aligned": True}}),
    ("xtrain.seed", {"xtrain": {"engine": "deepspeed", "seed": 1234}}),
    ("xtrain.max_skipped_steps", {"xtrain": {"engine": "deepspeed", "max_skipped_steps": 20}}),
    ("checkpoint.format", {"checkpoint": {"format": "xtrain"}}),
])  # fmt: skip
def test_keys_of_the_native_engine_alone_are_refused(key: str, more: dict[str, Any]) -> None:
    config = {"train_batch_size": 1, "xtrain": {"engine": "deepspeed"}, **more}
    with pytest.raises(ConfigError, match=f"config key '{key}' .* is for xtrain's own engine"):
        load_config(config)


def test_the_config_goes_over_whole() -> None:
    given = {
        "train_batch_size": 8,
        "checkpoint": {"format": "deepspeed", "use_node_local_storage": True},
        "sparse_gradients": True,  # not there yet in xtrain's engine
        "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2},
        "xtrain": {"engine": "deepspeed", "aligned": False, "max_skipped_steps": 0, "tokens_per_sample": 3},
    }
    checked = load_config(given)
    assert checked.notices == []
    assert config_for_deepspeed(checked) == {
        "train_batch_size": 8,
        "checkpoint": {"use_node_local_storage": True},
        "sparse_gradients": True,
        "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2},
    }
    assert given["checkpoint"]["format"] == "deepspeed"  # the script's own dictionary is left alone
    with pytest.raises(NotImplementedYetError, match="sparse_gradients"):
        load_config({**given, "checkpoint": {}, "xtrain": {}})
    with pytest.raises(ConfigError, match="did you mean 'sparse_gradients'"):
        load_config({"sparse_gradient": True, "xtrain": {"engine": "deepspeed"}})
