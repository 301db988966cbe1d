"""`xtrain migrate`: the command. Reading is done in scan.py, judging in judge.py, printing in show.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from xtrain.base.errors import ConfigError

VERDICTS = ("as_is", "shim", "change", "unsupported")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xtrain migrate`."""
    parser.add_argument("path", metavar="PATH", help="a repository's folder, or one file of it")
    parser.add_argument(
        "--json", action="store_true", help="print the findings as JSON (docs/howto/migrate.md)"
    )
    parser.add_argument(
        "--verdict",
        action="append",
        choices=VERDICTS,
        default=[],
        help="print findings of this verdict only; may be given several times. The exit status is that of all",
    )


def run(args: argparse.Namespace) -> int:
    """Exit status 0: all works, as it is or with `xtrain run`; 1: something does not; bad input (2) is raised.

    Raises:
        ConfigError: the path is not there, or holds no Python.
    """
    from rich.console import Console

    from xtrain.migrate import show
    from xtrain.migrate.judge import judge
    from xtrain.migrate.scan import READABLE, files_of, scan
    from xtrain.migrate.verdict import Verdict

    path = Path(args.path)
    files = list(files_of(path))
    if path.is_file() and path.suffix not in READABLE:
        raise ConfigError(f"{path} is none of the files that can be read: {', '.join(READABLE)}")
    if path.is_dir() and not any(file.suffix in (".py", ".ipynb") for file in files):
        raise ConfigError(f"there is no Python in {path}: no .py and no .ipynb file")
    findings = judge(scan(path))
    wanted = args.verdict or VERDICTS
    shown = [finding for finding in findings if finding.verdict.value in wanted]
    if args.json:
        print(show.as_json(args.path, findings, shown))
    else:
        show.show(Console(), args.path, findings, shown)
    bad = (Verdict.CHANGE, Verdict.UNSUPPORTED)
    return int(any(finding.verdict in bad for finding in findings))
