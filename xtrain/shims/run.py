"""`xtrain run script.py ...`: the script as it is, with xtrain for the names that it imports."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from xtrain.base.errors import ConfigError
from xtrain.shims import process

_TEXT = (
    "run a script as `python` does: `import deepspeed` and `import apex` mean xtrain, and torch.cuda means the "
    "selected backend; so they do in processes that it starts"
)


def parser() -> argparse.ArgumentParser:
    """The options of `xtrain run`; what follows the script is the script's."""
    made = argparse.ArgumentParser(prog="xtrain run", description=_TEXT)
    made.add_argument(
        "--device-shim",
        choices=process.MODES,
        default="auto",
        help="whether torch.cuda, .cuda(), 'cuda' and 'nccl' mean the selected backend (auto: where it is not CUDA)",
    )
    made.add_argument(
        "--backend", help="cuda, dcu, ascend, sunway, cpu, fake, ... (default: what the machine has)"
    )
    made.add_argument(
        "-m", dest="module", action="store_true", help="the script is a module's name, as in `python -m`"
    )
    made.add_argument("script", help="a Python file, with -m a module")
    made.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")
    return made


def command_line(argv: list[str]) -> int:
    """Become the script's process; only returns, with a status, when there is a mistake.

    Raises:
        ConfigError: there is no such script.
    """
    args = parser().parse_args(argv)
    if not args.module and not Path(args.script).exists():
        raise ConfigError(f"there is no script {args.script}: give a Python file, or -m and a module's name")
    environ = dict(os.environ)
    process.environment(args.device_shim, environ)
    if args.backend:
        environ["XTRAIN_BACKEND"] = args.backend
    sys.stdout.flush()
    sys.stderr.flush()
    script = ["-m", args.script] if args.module else [args.script]
    os.execve(sys.executable, [sys.executable, *script, *args.arguments], environ)
