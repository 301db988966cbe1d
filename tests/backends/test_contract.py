"""The contract (contract.py) on the backends that run here, and on a GPU where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.backends import contract
from xtrain.backends import get
from xtrain.base.errors import BackendError

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
NEEDS_RANKS = [
    "collectives_move_and_add", "every_stage_trains_like_pytorch_and_like_the_host",
    "states_in_host_memory_train_alike", "aligned_runs_repeat_in_every_stage", "a_checkpoint_continues",
    "states_move_to_the_host_and_back", "torchs_fused_optimizer_resumes",
]  # fmt: skip


def _failures(results: dict[str, tuple[str, str]]) -> str:
    return "\n".join(f"{title}: {why}" for title, (outcome, why) in results.items() if outcome == "FAILED")


@pytest.mark.parametrize("name", ["cpu", "sunway"])
def test_backends_of_the_host_keep_the_contract(ranks: Any, name: str) -> None:
    (alone,) = ranks(1, contract.run, name)
    assert set(alone) == set(contract.CHECKS)
    assert not (failed := _failures(alone)), failed
    for results in ranks(RANKS, contract.run, name, NEEDS_RANKS):
        assert not (failed := _failures(results)), failed


def _broken(check: str) -> dict[str, tuple[str, str]]:
    """Run one check on a cpu backend that does not keep its promise."""
    import torch

    from xtrain.backends.cpu import CpuBackend, CpuPrecision, CpuZero

    class Precision(CpuPrecision):
        norm_dtype = torch.bfloat16
        stand_ins = {torch.float32: torch.bfloat16}

    class Zero(CpuZero):
        alignment_bytes = 24

    class Broken(CpuBackend):
        precision, zero = Precision(), Zero()

    original, contract.get = contract.get, lambda name: Broken()  # type: ignore[attr-defined]
    try:
        return contract.run("cpu", [check])
    finally:
        contract.get = original  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "check",
    [
        "facets_answer_with_the_right_types", "long_sums_are_as_exact_as_claimed",
        "parameters_are_aligned_in_their_buffers",
    ],
)  # fmt: skip
def test_a_broken_promise_is_caught(ranks: Any, check: str) -> None:
    assert ranks(1, _broken, check)[0][check][0] == "FAILED"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example package as pip installs it, without a network."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(ROOT / "examples" / "example_backend", folder / "source")  # pip builds in place
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run(
        [*command, "--target", str(folder / "site"), str(folder / "source")], check=True, capture_output=True
    )
    return folder / "site"


def _python(*arguments: str, path: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}", **env}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600
    )


def test_an_installed_package_is_found_and_keeps_the_contract(installed: Path) -> None:
    done = _python("-m", "tests.backends.contract", "example", path=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 checks failed" in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("not here")] == [
        "not here  rank 0  overflow shows: no float16"
    ]
    assert (
        "backend 'example' has no float16 on this chip: the model is trained in float32 instead"
        in done.stderr
    )


def test_an_installed_package_can_be_unavailable(installed: Path) -> None:
    done = _python("-m", "tests.backends.contract", "example", path=installed, EXAMPLE_DEVICES="0")
    assert done.returncode == 2
    assert "backend 'example' cannot be used here: EXAMPLE_DEVICES is 0" in done.stderr
    one = _python(
        "-m",
        "tests.backends.contract",
        "example",
        path=installed,
        EXAMPLE_VISIBLE_DEVICES="0",
        LOCAL_RANK="1",
    )
    assert one.returncode == 2
    assert "local rank 1 has no device of its own: there are 1" in one.stderr


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("cuda", "dcu", "ascend")]
)
def test_chips_keep_the_contract(name: str) -> None:
    try:
        get(name)
    except BackendError as error:
        pytest.skip(str(error))
    done = _python("-m", "tests.backends.contract", name)
    assert done.returncode == 0, done.stdout + done.stderr
    count = get(name).runtime.device_count() or 1
    if count > 1:
        done = _python(
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "tests.backends.contract", name),
        )
        assert done.returncode == 0, done.stdout + done.stderr
