"""Runs a script with the installed deepspeed, and xtrain's apex and torch.cuda: the script's own names say CUDA.

    torchrun -m tests.zero_lines.beside_real SCRIPT ARGS

So that real DeepSpeed's curve on the host can be had for a script that only knows CUDA.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch  # noqa: F401 - before deepspeed, which asks it what is there

from xtrain.backends import registry
from xtrain.shims import alias, device
from xtrain.shims.patches import Patches

if __name__ == "__main__":
    # DeepSpeed looks for what was compiled for CUDA; on the host it must be told the truth, as torch is.
    import deepspeed  # noqa: F401

    device.activate(registry.get("cpu"), Patches())
    alias.install("apex", "amp_C")
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
