"""What scripts import of DeepSpeed's inner modules: divided tensors, overflows, norms, constants, files, loggers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import xtrain
from tests.deepspeed_api import probe
from xtrain.activation_checkpointing import checkpointing as activation_checkpointing
from xtrain.base import log
from xtrain.base.errors import ConfigError, NotImplementedYetError, TrainingError
from xtrain.base.missing import MissingNameError
from xtrain.config import load_config
from xtrain.runtime import config as runtime_config
from xtrain.runtime import constants
from xtrain.runtime import utils as runtime_utils
from xtrain.runtime.activation_checkpointing.offload_activations import (
    CheckpointHiddenStatesOffload,
    get_checkpoint_hidden_states_offloading_ctx_manager,
)
from xtrain.runtime.comm.coalesced_collectives import all_to_all_quant_reduce, reduce_scatter_coalesced
from xtrain.utils import pin_memory_tracker, zero_to_fp32
from xtrain.utils.logging import LoggerFactory

Ranks = Callable[..., list[Any]]

# ---------------------------------------------------------------- tensors divided over a group


def _divide() -> list[bool]:
    """Every rank's part is its piece of the flat tensor, and the whole comes back, from a description too."""
    rank, group, equal = dist.get_rank(), dist.group.WORLD, []
    for shape in ((8, 3), (7, 5), (1,), ()):
        whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
        part = runtime_utils.PartitionedTensor(whole, group)
        mine = torch.tensor_split(whole.reshape(-1), dist.get_world_size())[rank]
        sent = runtime_utils.PartitionedTensor.from_meta(part.to_meta(), part.data().clone(), group)
        equal += [
            torch.equal(part.data(), mine),
            torch.equal(part.full(), whole),
            torch.equal(sent.full(), whole),
        ]
        equal += [part.local_size() == mine.shape, part.full_size() == list(shape)]
    with pytest.raises(ConfigError, match="divided over 5 ranks"):
        runtime_utils.PartitionedTensor.from_meta(torch.tensor([1, 8, 5, 0, 0, 8]), torch.zeros(3), group)
    return equal


def test_a_tensor_is_divided_and_gathered(ranks: Ranks) -> None:
    assert all(all(equal) for equal in ranks(3, _divide))


def _coalesced() -> list[list[float]]:
    rank = dist.get_rank()
    tensors = [torch.arange(7.0) * (rank + 1), torch.full((2, 2), float(rank)), torch.tensor([6.0 * rank])]
    with pytest.raises(NotImplementedYetError, match="compressed communication"):
        all_to_all_quant_reduce(tensors, {})
    return [piece.tolist() for piece in reduce_scatter_coalesced(tensors)]


def test_many_tensors_are_averaged_in_one_message(ranks: Ranks) -> None:
    """The pieces of all ranks, one after the other, are the means."""
    pieces = zip(*ranks(3, _coalesced), strict=True)
    whole = [[value for piece in found for value in piece] for found in pieces]
    assert whole == [[0, 2, 4, 6, 8, 10, 12], [1, 1, 1, 1], [6]]


# ---------------------------------------------------------------- overflows and norms


def _params(*grads: float, expert: bool = False) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros(2)) for _ in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.tensor([grad, 1.0])
        if expert:
            param.allreduce = False  # type: ignore[attr-defined]
    return params


def _overflows() -> dict[str, bool]:
    """The last rank alone has an infinity."""
    last = dist.get_rank() == dist.get_world_size() - 1
    params, experts = (_params(1.0, math.inf if last else 2.0, expert=kind) for kind in (False, True))
    mpu = SimpleNamespace(get_model_parallel_group=lambda: dist.group.WORLD)
    check = runtime_utils.CheckOverflow
    norm = runtime_utils.get_weight_norm([param.grad for param in params])
    return {
        "alone": check([params]).check(),
        "divided": check([params], zero_reduce_scatter=True).check(),
        "engine": check([params], deepspeed=SimpleNamespace(enable_backward_allreduce=False)).check(),
        "mpu": check([params], mpu=mpu).check(),
        "experts": check([experts]).check(),
        "others": check().check([experts]),
        "norm, alone": check([params]).check_using_norm([1.0, norm], reduce_overflow=False),
        "norm": check([params]).check_using_norm([1.0, norm]),
        "fine": check([_params(1.0)], zero_reduce_scatter=True).check(),
    }


def test_ranks_agree_on_overflows_where_they_step_together(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks(2, _overflows)):
        alone = {name: found.pop(name) for name in ("alone", "norm, alone")}
        assert set(alone.values()) == {rank == 1}
        assert not found.pop("fine")
        assert all(found.values()), found


def _norms() -> list[tuple[float, float]]:
    """(ours, by torch on the whole model): the first tensor is common to both ranks, the second is divided."""
    common, own = torch.arange(3.0), torch.arange(4.0) + 10 * dist.get_rank()
    own.model_parallel = True  # type: ignore[attr-defined]
    mpu = SimpleNamespace(
        get_model_parallel_group=lambda: dist.group.WORLD, get_model_parallel_rank=dist.get_rank
    )
    whole = torch.cat([common, torch.arange(4.0), torch.arange(4.0) + 10])
    pairs = []
    for kind in (2, 1, math.inf):
        expected = float(torch.linalg.vector_norm(whole.double(), kind))
        pairs.append((runtime_utils.get_weight_norm([common, own], kind, mpu), expected))
    params = _params(3.0, 4.0)
    params.append(nn.Parameter(torch.zeros(1)))  # no gradient
    pairs.append((runtime_utils.get_grad_norm(params), math.sqrt(9 + 16 + 2)))
    pairs.append((runtime_utils.get_weight_norm(torch.tensor([math.nan, 1.0])), -1.0))
    pairs.append((runtime_utils.get_grad_norm(_params(math.inf), math.inf), -1.0))
    return pairs


def test_norms_are_those_of_the_whole_model(ranks: Ranks) -> None:
    for pairs in ranks(2, _norms):
        for ours, expected in pairs:
            assert ours == pytest.approx(expected, rel=1e-12)


def _clip_experts() -> tuple[float, float]:
    shared, expert = _params(0.0)[0], _params(3.0 + 4.0 * dist.get_rank(), expert=True)[0]
    total = runtime_utils.clip_grad_norm_([shared, expert], max_norm=0.5)
    assert shared.grad is not None
    return float(total), float(shared.grad[1])


def test_ranks_with_other_experts_clip_by_one_factor(ranks: Ranks) -> None:
    mean = (math.sqrt(1 + 9 + 1) + math.sqrt(1 + 49 + 1)) / 2
    for total, common in ranks(2, _clip_experts):
        assert total == pytest.approx(mean, rel=1e-6)
        assert common == pytest.approx(0.5 / mean, rel=1e-5)


def test_parameters_that_a_backward_pass_reaches_are_counted() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    counts: list[int] = []
    used.register_hook(
        lambda grad: counts.append(runtime_utils.count_used_parameters_in_backward([used, unused]))
    )  # type: ignore[no-untyped-call]
    (used * 2).sum().backward()
    assert counts == [1]


# ---------------------------------------------------------------- constants and the config


def test_constants_name_keys_that_the_config_knows() -> None:
    keys = set(probe.read_record()["config"])
    parts = {part for key in keys for part in key.split(".")}
    elsewhere = {"train", "eval", "predict", "encode", "mean", "sum", "max_grad_norm", "data_parallel_group"}
    elsewhere |= {"global_rank", "check_overflow", "auto_cast", "legacy_fusion"}
    for name, value in vars(constants).items():
        if name.isupper() and isinstance(value, str) and not name.endswith("_DEFAULT"):
            assert value in parts | elsewhere, name


def test_defaults_are_those_of_a_config_that_says_nothing() -> None:
    values: Any = load_config({"train_batch_size": 1}).values
    assert vars(constants)["GRADIENT_CLIPPING_DEFAULT"] == values.gradient_clipping
    assert vars(constants)["FP16_LOSS_SCALE_WINDOW_DEFAULT"] == values.fp16.loss_scale_window
    assert vars(constants)["TORCH_AUTOCAST_ENABLED_DEFAULT"] is values.torch_autocast.enabled is False
    assert vars(constants)["GRAD_ACCUM_DTYPE_DEFAULT"] is values.data_types.grad_accum_dtype is None
    assert runtime_config.get_gradient_clipping({}) == values.gradient_clipping
    assert runtime_config.get_gradient_clipping({"gradient_clipping": 0.25}) == 0.25
    assert runtime_config.get_log_level({"log_level": "error"}) == "error"
    assert runtime_config.get_log_level({}) is None
    assert runtime_config.get_train_batch_size({"train_batch_size": 8}) == 8


def test_a_loss_scale_that_is_no_number_says_so() -> None:
    with pytest.raises(ConfigError, match="must be a number, not a list"):
        load_config({"train_batch_size": 1, "fp16": {"enabled": True, "loss_scale": [1]}})


# ---------------------------------------------------------------- files, loggers, pinned memory


def test_files_of_a_checkpoint_in_deepspeeds_format(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no files"):
        zero_to_fp32.get_optim_files(tmp_path)
    ranks = [0, 1, 2, 10, 11]
    for rank in reversed(ranks):
        (tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    (tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    found = [Path(name).name for name in zero_to_fp32.get_optim_files(tmp_path)]
    assert found == [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in ranks]
    assert zero_to_fp32.get_model_state_file(tmp_path, 3).endswith(
        "zero_pp_rank_0_mp_rank_00_model_states.pt"
    )
    assert len(zero_to_fp32.get_model_state_files(tmp_path)) == 1
    with pytest.raises(FileNotFoundError, match=r"mp_rank_00_model_states\.pt"):
        zero_to_fp32.get_model_state_file(tmp_path, 2)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        zero_to_fp32.get_model_state_file(tmp_path / "x", 2)


def test_a_logger_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    made = LoggerFactory.create_logger("a test's logger", logging.WARNING)
    assert LoggerFactory.create_logger("a test's logger", logging.WARNING) is made
    made.warning("once")
    made.info("not at all")
    assert capsys.readouterr().out.count("once") == 1
    assert not made.propagate
    with pytest.raises(ConfigError, match="needs a name"):
        LoggerFactory.create_logger()


def test_pinned_memory_is_logged_when_it_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(pin_memory_tracker, "log_dist", lines.append)
    tracker = pin_memory_tracker.PinnedMemoryTracker()
    gib = 2**30
    for size in (31 * gib, 2 * gib, gib, 100 * gib):
        tracker.add(size)
    assert [line.split(": ")[1][:36] for line in lines] == [
        "more than 32.000 GB of host memory a",
        "more than 128.000 GB of host memory ",
    ]
    assert pin_memory_tracker._fmt_bytes(1536) == "1.5 KB"
    pin_memory_tracker.track_pinned_memory(3 * 2**20)
    pin_memory_tracker.pinned_memory_summary("here")
    assert "here: 3.00 MB in 1 allocations" in lines[-1]
    pin_memory_tracker._tracker.reset()


# ---------------------------------------------------------------- inputs of checkpointed layers on the host


class _AlsoFromHost(CheckpointHiddenStatesOffload):
    """Takes host memory for a device's: tensors are copied away and back."""

    def _stays(self, tensor: torch.Tensor) -> bool:
        return False


def _run(
    layers: nn.ModuleList, x: torch.Tensor, offload: CheckpointHiddenStatesOffload | None
) -> torch.Tensor:
    for layer in layers:
        if offload is not None:
            offload.mark(x)
        x = checkpoint(layer, x, use_reentrant=False)
    return x.square().sum()


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_offloaded_inputs_give_the_same_gradients(keep: int) -> None:
    torch.manual_seed(1)
    layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
    x = torch.randn(4, 6, requires_grad=True)
    leaves = [x, *layers.parameters()]
    expected = torch.autograd.grad(_run(layers, x, None), leaves)
    offload = _AlsoFromHost(use_pin_memory=False, keep_last_count=keep)
    for step in (1, 2):
        with offload:
            loss = _run(layers, x, offload)
            found = torch.autograd.grad(loss, leaves, retain_graph=True)
            again = torch.autograd.grad(loss, leaves)
            del loss
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
        assert offload.stats.offloaded_tensors == offload.stats.restored_tensors == step * (3 - keep)
        assert offload.stats.kept_last_tensors == step * keep
        assert offload._pooled == 3 - keep  # the buffers of the first step serve the second


def test_offloading_leaves_alone_what_it_should() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    with get_checkpoint_hidden_states_offloading_ctx_manager(use_pin_memory=False) as offload:
        layer(x).sum().backward()
        assert offload.stats.marked_tensors == 0
        offload.mark(x)
        layer(x).sum().backward()  # marked, and on the host already
        with pytest.raises(TrainingError, match="not re-entrant"):
            offload.__enter__()
    assert offload.stats.skipped_marked_tensors == 1
    assert offload.stats.offloaded_tensors == 0
    with pytest.raises(ConfigError, match="keep_last_count"):
        CheckpointHiddenStatesOffload(keep_last_count=-1)


def test_the_record_of_all_names_is_whole() -> None:
    every = json.loads(probe.record.RECORD.read_text())["every"]
    assert len(every) > 700
    assert {"_CUDA_RNG_STATE_TRACKER"} <= set(every["runtime.activation_checkpointing.checkpointing"].split())
    assert "ssh" not in every["launcher.runner"].split()


# ---------------------------------------------------------------- engines that share a loss


def _share_a_loss() -> list[tuple[list[float], list[float]]]:
    """(weights after one step of SGD, the same by hand) of two engines whose modules are called without them."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
    }
    starts = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])]
    engines = []
    for start in starts:
        model = nn.Linear(2, 1, bias=False)
        model.weight.data.copy_(start)
        engines.append(xtrain.initialize(model=model, model_parameters=model.parameters(), config=config)[0])
    x = torch.tensor([[1.0, float(dist.get_rank())]])
    sum(engine.module(x).sum() / (number + 1) for number, engine in enumerate(engines)).backward()
    for engine in engines:
        engine._backward_epilogue()
        engine.step()
    mean = torch.tensor([[1.0, 0.5]])  # of x over the two ranks
    expected = [start - 0.5 * mean / (number + 1) for number, start in enumerate(starts)]
    found = [engine.module.weight.detach() for engine in engines]
    return [(a.flatten().tolist(), b.flatten().tolist()) for a, b in zip(found, expected, strict=True)]


def test_engines_that_share_a_loss_step_by_the_mean(ranks: Ranks) -> None:
    for pairs in ranks(2, _share_a_loss):
        for found, expected in pairs:
            assert found == pytest.approx(expected)


# ---------------------------------------------------------------- names by DeepSpeed's paths


def test_names_by_inner_paths_are_the_same_objects() -> None:
    from xtrain import checkpointing, comm
    from xtrain.comm import comm as inner
    from xtrain.utils import groups

    assert xtrain.dist is comm
    assert inner.all_reduce is comm.all_reduce
    assert inner.ReduceOp is comm.ReduceOp
    assert runtime_config.DeepSpeedConfigError is xtrain.DeepSpeedConfigError
    assert xtrain.checkpoint.ZERO_STAGE == "zero_stage"
    assert xtrain.DeepSpeedOptimizerCallable.__args__[-1] is torch.optim.Optimizer
    assert checkpointing._CUDA_RNG_STATE_TRACKER is xtrain.checkpointing.get_cuda_rng_tracker()
    with pytest.raises(MissingNameError, match=r"checkpointing\.detach_variable"):
        xtrain.checkpointing.detach_variable  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(MissingNameError, match="mixture of experts"):
        groups._get_expert_model_parallel_world_size  # noqa: B018


def test_a_level_that_the_script_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XTRAIN_LOG_LEVEL", raising=False)
    before = log.logger.level
    try:
        log.logger.setLevel(logging.ERROR)
        log.configure()
        assert log.logger.level == logging.ERROR
        log.configure("warning")
        assert log.logger.level == logging.WARNING
        monkeypatch.setenv("XTRAIN_LOG_LEVEL", "debug")
        log.configure()
        assert log.logger.level == logging.DEBUG
        monkeypatch.delenv("XTRAIN_LOG_LEVEL")
        log.logger.setLevel(logging.NOTSET)
        log.configure()
        assert log.logger.level == logging.INFO
    finally:
        log.logger.setLevel(before)


def _settings_as_globals() -> list[Any]:
    cp: Any = activation_checkpointing
    cp.mpu, cp.deepspeed_checkpointing_enabled = None, False  # an earlier test may have left its own
    cp.CONTIGUOUS_CHECKPOINTING = cp.PARTITION_ACTIVATIONS = cp.CPU_CHECKPOINT = cp.SYNCHRONIZE = False
    cp.num_layers = None
    seen = [cp.PARTITION_ACTIVATIONS, cp.num_layers, cp.mpu, cp.deepspeed_checkpointing_enabled]
    cp.configure(None, partition_activations=True, num_checkpoints=3, synchronize=True)
    seen += [cp.PARTITION_ACTIVATIONS, cp.num_layers, cp.SYNCHRONIZE, cp.CPU_CHECKPOINT]
    seen += [cp.deepspeed_checkpointing_enabled]
    cp.num_layers = None
    with pytest.raises(ConfigError, match="the number of layers"):
        cp.CONTIGUOUS_CHECKPOINTING = True
    cp.CPU_CHECKPOINT = True
    return [*seen, cp.CPU_CHECKPOINT, cp.CONTIGUOUS_CHECKPOINTING]


def test_settings_of_checkpointing_read_as_globals(ranks: Ranks) -> None:
    (seen,) = ranks(1, _settings_as_globals)
    assert seen == [False, None, None, False, True, 3, True, False, True, True, False]
