"""`deepspeed.env_report`, and `python -m deepspeed.env_report`: what `xtrain doctor` says."""

import argparse
import sys
from collections.abc import Sequence

from xtrain.doctor import main as doctor


def main(argv: Sequence[str] = ()) -> int:
    """Print the report; returns its status."""
    parser = argparse.ArgumentParser(prog="deepspeed.env_report")
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(list(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
