"""`deepspeed.env_report`, and `python -m deepspeed.env_report`: versions, operators and backends, not examined.

Training scripts print it at their start, so that nothing is started or measured here; that is `xtrain doctor`.
"""

from __future__ import annotations

import argparse
import platform

import torch

from xtrain.backends import registry
from xtrain.base.missing import API_VERSION
from xtrain.ops.op_builder.all_ops import ALL_OPS
from xtrain.version import __version__


def op_report(verbose: bool = True) -> None:
    """Print which of DeepSpeed's operators have a counterpart; none is compiled."""
    print("operators of DeepSpeed, none of which is compiled:")
    for name, builder in ALL_OPS.items():
        print(f"  {name} {'.' * (32 - len(name))} {'there' if builder.is_compatible() else 'not there'}")


def debug_report() -> None:
    """Print versions, and every backend with what is in its way."""
    versions = f"torch {torch.__version__}; Python {platform.python_version()}"
    print(f"xtrain {__version__}, for DeepSpeed {API_VERSION}; {versions}")
    print(f"backend that a script gets here: {registry.detect().name}")
    for name, reason in registry.available().items():
        print(f"  {name} {'.' * (32 - len(name))} {reason or 'can be used'}")
    print("xtrain doctor examines the machine")


def main(hide_operator_status: bool = False, hide_errors_and_warnings: bool = False) -> None:
    """Print the report. The second argument is DeepSpeed's; there is nothing that it hides."""
    if not hide_operator_status:
        op_report(verbose=not hide_errors_and_warnings)
    debug_report()


def parse_arguments() -> argparse.Namespace:
    """The options of `python -m deepspeed.env_report`."""
    parser = argparse.ArgumentParser(prog="deepspeed.env_report")
    parser.add_argument("--hide_operator_status", action="store_true", help="leave the operators out")
    parser.add_argument(
        "--hide_errors_and_warnings", action="store_true", help="accepted; there is none to hide"
    )
    return parser.parse_args()


def cli_main() -> None:
    """The command."""
    args = parse_arguments()
    main(
        hide_operator_status=args.hide_operator_status, hide_errors_and_warnings=args.hide_errors_and_warnings
    )


if __name__ == "__main__":
    cli_main()
