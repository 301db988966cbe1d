"""DeepSpeed's `python -m deepspeed.launcher.launch`: the ranks of one node."""

from __future__ import annotations

import argparse
import sys

from xtrain.launch.deepspeed import node as deepspeed_node
from xtrain.launch.deepspeed import options as deepspeed_options
from xtrain.launch.deepspeed.command import PID_FOLDER

PID_FILE_BASEPATH = str(PID_FOLDER)


def parse_args() -> argparse.Namespace:
    """The options of the command line."""
    return deepspeed_options.parse(sys.argv[1:], deepspeed_options.node_parser())


def main() -> None:
    """Run the command line; leaves by sys.exit when it fails."""
    status = deepspeed_node.command_line(sys.argv[1:])
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
