"""The tests of bits (marked `bits`) with the kernels of other processors than this machine's.

Kernels of other vector widths round by other alignments and lengths, so that a mistake in where things lie may show on
one processor and not on another. The machine's own kernels run in the first stage of CI.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SECONDS = 1500.0
PROCESSORS = {
    "default": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
"""torch's name of the kernels (ATEN_CPU_CAPABILITY), and what keeps its libraries to the like."""
LEFT_OUT = "not hosts and not 4-stage"
"""Slow to start and the same to the kernels: ranks on pretended hosts, four ranks under mpiexec."""


def _python(*arguments: str, capability: str) -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={
            **os.environ, **PROCESSORS[capability], "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": places
        },
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("capability", PROCESSORS)
def test_bits_do_not_depend_on_the_processor(capability: str) -> None:
    if torch.backends.cpu.get_cpu_capability().lower() == capability:
        pytest.skip(
            f"{capability} kernels are this processor's own, with which the first stage of CI runs these tests"
        )
    asked = _python(
        "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())", capability=capability
    )
    if asked.stdout.strip().lower() != capability:
        pytest.skip(f"torch has no {capability} kernels for this processor, but {asked.stdout.strip()}")
    outcome = _python(
        "-m", "pytest", "-q", "-m", "bits and not slow", "-k", LEFT_OUT, "-p", "no:cacheprovider",
        capability=capability,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout[-6000:]
    assert " passed" in outcome.stdout
