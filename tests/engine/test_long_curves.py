"""Curves of glm_tiny itself over one hundred steps. Slow: `pytest -m slow`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import xtrain
from tests import training
from tests.comm import test_mpi
from tests.parity.cases import BETAS, CLIP, EPS, LR, flags, load_script
from tests.parity.corpus import write_corpus
from tests.parity.record import largest_difference
from xtrain import comm

pytestmark = pytest.mark.slow

STEPS, BATCH, SLOTS = 100, 8, 4
STAGES = (0, 1, 2, 3)


def _script(folder: str, *more: str) -> tuple[Any, Any, Any]:
    script = load_script("xtrain")
    args = script.parse_args([*flags(Path(folder) / "corpus.txt"), "--seq-length=64", *more])
    return script, args, script.build_model(args)


def _curve(folder: str, stage: int, dtype: str, aligned: bool, slots: int = SLOTS) -> list[str]:
    """Exact losses of 100 steps over `slots` micro-batches, divided over the ranks."""
    script, args, model = _script(folder, *(("--dropout=0.1", "--aligned-init") if aligned else ()))
    engine, _, _, _ = xtrain.initialize(
        model=model,
        model_parameters=script.build_param_groups(model, args.weight_decay),
        config={
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": BATCH // slots,
            "gradient_clipping": CLIP,
            "bf16": {"enabled": dtype == "bf16"},
            "zero_optimization": training.zero(stage, 1000, reduce_bucket_size=100_000),
            "optimizer": {"type": "AdamW", "params": {"lr": LR, "betas": list(BETAS), "eps": EPS}},
            "xtrain": {"aligned": aligned},
        },
    )
    mpu, sampler = script.DataParallelUnit(), script.build_sampler(args)
    return [script.train_step(engine, sampler, mpu, step).hex() for step in range(STEPS)]


def _float64_curve(folder: str) -> list[float]:
    """The same steps by PyTorch alone, without an engine."""
    script, args, model = _script(folder)
    model.double()
    sampler = script.build_sampler(args)
    optimizer = torch.optim.AdamW(
        script.build_param_groups(model, args.weight_decay), lr=LR, betas=BETAS, eps=EPS
    )
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for slot in range(SLOTS):
            batch = {
                n: torch.from_numpy(array) for n, array in sampler.batch(step, slot, BATCH // SLOTS).items()
            }
            loss = model(**batch) / SLOTS
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(total)
    return losses


def _floats(curve: list[str]) -> list[float]:
    return [float.fromhex(loss) for loss in curve]


def _shared_memory_curves(folder: str) -> list[list[str]]:
    """Aligned, by stage."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    where = f"file://{folder}/store{ranks}"
    comm.init_distributed("shm", init_method=where, rank=rank, world_size=ranks, verbose=False)
    return [_curve(folder, stage, "fp32", True) for stage in STAGES]


def _mpi_main(folder: str) -> None:
    """Under mpiexec: the same over MPI as the `sunway` backend, written by rank 0."""
    torch.set_num_threads(1)
    comm.init_distributed("mpi", verbose=False)
    curves = [_curve(folder, stage, "fp32", True) for stage in STAGES]
    if dist.get_rank() == 0:
        (Path(folder) / f"mpi{dist.get_world_size()}.json").write_text(json.dumps(curves))


@pytest.mark.parametrize("world", [2, 4])
def test_libraries_give_the_same_bits(ranks: Any, tmp_path: Path, world: int) -> None:
    """gloo, shared memory and (where it is installed) MPI as sunway has it, in every stage."""
    write_corpus(tmp_path)
    expected = [ranks(world, _curve, str(tmp_path), 0, "fp32", True)[0]] * len(STAGES)
    assert ranks(world, _shared_memory_curves, str(tmp_path))[0] == expected
    if not test_mpi.MPI_MISSING:
        outcome = test_mpi.start(
            "tests.engine.test_long_curves", str(tmp_path), ranks=world, seconds=900, XTRAIN_BACKEND="sunway"
        )
        assert outcome.returncode == 0, outcome.stderr[-3000:]
        assert json.loads((tmp_path / f"mpi{world}.json").read_text()) == expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_aligned_stages_and_splits_give_the_same_bits(ranks: Any, tmp_path: Path, dtype: str) -> None:
    """1 x 4, 2 x 2 and 4 x 1 (ranks x accumulation) in every stage, with dropout."""
    write_corpus(tmp_path)
    expected = ranks(1, _curve, str(tmp_path), 0, dtype, True)[0]
    for world, stage in [(1, 3), *((world, stage) for world in (2, 4) for stage in STAGES)]:
        assert ranks(world, _curve, str(tmp_path), stage, dtype, True)[0] == expected, (world, stage)


@pytest.mark.parametrize("world", [2, 4])
def test_bf16_stages_agree_without_aligned_mode(ranks: Any, tmp_path: Path, world: int) -> None:
    """One micro-batch a step: with more, stages 0 and 1 add them up before the ranks do and 2 and 3 after."""
    write_corpus(tmp_path)
    curves = [
        _floats(ranks(world, _curve, str(tmp_path), stage, "bf16", False, world)[0]) for stage in STAGES
    ]
    for curve in curves[1:]:
        assert largest_difference(curve, curves[0]) < 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_fp32_curve_against_float64(ranks: Any, tmp_path: Path, stage: int) -> None:
    write_corpus(tmp_path)
    exact = ranks(1, _float64_curve, str(tmp_path))[0]
    ours = _floats(ranks(2, _curve, str(tmp_path), stage, "fp32", False)[0])
    assert largest_difference(ours, exact) < 1e-5


if __name__ == "__main__":
    _mpi_main(sys.argv[1])
