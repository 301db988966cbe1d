"""Record the curves of real DeepSpeed and of float64 PyTorch, and compare xtrain with them live.

    python -m tests.parity.record [--check]

Writes tests/parity/golden.json; with --check nothing is written and the recorded curves are compared
with the new ones too. Needs the extra `deepspeed`; `make parity` installs it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.parity.cases import CASES, GOLDEN, ROOT, STEPS, case_name, flags, write_config
from tests.parity.corpus import write_corpus

COMMAND = "python -m tests.parity.record"


def run_engine(engine: str, dtype: str, ranks: int, folder: Path, corpus: Path) -> list[float]:
    """One run of the example script by torchrun; returns its losses."""
    config = write_config(folder, dtype, torch_adam=engine == "deepspeed")
    output = folder / f"{engine}_{dtype}_{ranks}.json"
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    command += ["-m", "tests.parity.run_case", engine, str(output), *flags(corpus)]
    command += ["--deepspeed", "--deepspeed_config", str(config)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "XTRAIN_CACHE": str(folder)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"{engine}, {dtype}, {ranks} ranks failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return [float.fromhex(loss) for loss in json.loads(output.read_text())]


def float64_run(folder: Path, corpus: Path) -> list[float]:
    """The float64 reference, in a process of its own."""
    code = (
        "import sys, json, pathlib, xtrain; from tests.parity.float64 import float64_curve; "
        "xtrain.init_distributed(verbose=False); "
        "print(json.dumps([x.hex() for x in float64_curve(pathlib.Path(sys.argv[1]))]))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "XTRAIN_CACHE": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(corpus)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr[-4000:])
    return [float.fromhex(loss) for loss in json.loads(done.stdout.splitlines()[-1])]


def largest_difference(curve: list[float], reference: list[float]) -> float:
    """Largest relative difference over the steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(curve, reference, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    check = parser.parse_args().check
    curves: dict[str, list[float]] = {}
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder)
        curves["float64"] = float64_run(folder, corpus)
        print("largest relative difference over the steps:")
        print(f"{'run':<22}{'xtrain - DeepSpeed':>20}{'xtrain - float64':>18}{'DeepSpeed - float64':>21}")
        for dtype, ranks in CASES:
            theirs = run_engine("deepspeed", dtype, ranks, folder, corpus)
            ours = run_engine("xtrain", dtype, ranks, folder, corpus)
            curves[case_name(dtype, ranks)] = theirs
            apart, our_error, their_error = (
                largest_difference(ours, theirs),
                largest_difference(ours, curves["float64"]),
                largest_difference(theirs, curves["float64"]),
            )
            fits = apart < 1e-4 if dtype == "fp32" else apart < 0.02 or our_error < their_error
            good &= fits
            verdict = "" if fits else "  OUTSIDE"
            print(
                f"{case_name(dtype, ranks):<22}{apart:>20.2e}{our_error:>18.2e}{their_error:>21.2e}{verdict}",
                flush=True,
            )
    if check:
        recorded = json.loads(GOLDEN.read_text())["curves"]
        for case, curve in curves.items():
            stored = [float.fromhex(loss) for loss in recorded[case]]
            print(f"recorded against now, {case}: {largest_difference(curve, stored):.2e}")
    else:
        versions = {
            name: importlib.metadata.version(name) for name in ("deepspeed", "torch", "tokenizers", "numpy")
        }
        golden = {
            "command": COMMAND,
            "recorded": time.strftime("%Y-%m-%d"),
            "versions": {**versions, "python": platform.python_version(), "machine": platform.machine()},
            "script": "examples/pretrain_glm.py with `import deepspeed`, glm_tiny, tests/parity/corpus.py",
            "steps": STEPS,
            "curves": {case: [loss.hex() for loss in curve] for case, curve in curves.items()},
        }
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
        print(f"recorded in {GOLDEN.relative_to(ROOT)}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
