"""`xtrain doctor`: the command. Examining is done in local.py and launched.py, printing in show.py."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console

from xtrain.base.errors import ConfigError

PATIENCE = 60.0
RANKS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xtrain doctor`."""
    parser.add_argument(
        "--backend", metavar="NAME", help="examine this one (default: what a script would get)"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help=f"ranks to start on this host (default {RANKS}); under torchrun, mpiexec or srun theirs are used",
    )
    parser.add_argument(
        "--library",
        metavar="NAME",
        action="append",
        default=[],
        help="probe this process-group library only",
    )
    parser.add_argument("--quick", action="store_true", help="leave out the bandwidth")
    parser.add_argument("--json", action="store_true", help="print the report as JSON (docs/doctor.md)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=PATIENCE,
        metavar="SECONDS",
        help=f"how long nothing may happen before something counts as hanging (default {PATIENCE:g})",
    )


def run(args: argparse.Namespace) -> int:
    """Exit status 0: the selected backend is well, 1: it is not; mistakes in the arguments (2) are raised."""
    from xtrain.doctor import launched, local

    if args.ranks is not None and args.ranks < 1:
        raise ConfigError(f"--ranks {args.ranks}: at least one rank is needed")
    if args.timeout <= 0:
        raise ConfigError(f"--timeout {args.timeout:g}: it must be a positive number of seconds")
    if launched.is_one_of_several():
        if args.ranks is not None:
            raise ConfigError(f"--ranks {args.ranks}: a launcher has started the ranks already; leave it out")
        report = launched.examine(
            args.backend, args.quick, args.library, args.timeout, lambda found: _print(found, args.json)
        )
        if report is None:
            return 0
    else:
        status = Console(stderr=True)
        report = local.examine(
            args.backend,
            args.ranks or RANKS,
            args.quick,
            args.library,
            args.timeout,
            lambda text: status.print(f"{text} ...", style="dim", markup=False, highlight=False),
        )
    _print(report, args.json)
    return 0 if report["ok"] else 1


def _print(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, indent=1), flush=True)
        return
    from xtrain.doctor.show import show

    console = Console()
    show(report, console if console.is_terminal else Console(width=160))
