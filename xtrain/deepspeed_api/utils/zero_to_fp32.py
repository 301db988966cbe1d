"""`deepspeed.utils.zero_to_fp32`: see xtrain.checkpoint.export. As a program:

python -m xtrain.utils.zero_to_fp32 CHECKPOINT_DIR OUTPUT_DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from xtrain.base.errors import XtrainError
from xtrain.checkpoint.export import (
    convert,
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)

__all__ = [
    "convert_zero_checkpoint_to_fp32_state_dict",
    "get_fp32_state_dict_from_zero_checkpoint",
    "load_state_dict_from_zero_checkpoint",
]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zero_to_fp32",
        description="Write the float32 weights of a checkpoint as files for other programs.",
    )
    parser.add_argument(
        "checkpoint_dir", help="the folder that save_checkpoint wrote to, with its file `latest`"
    )
    parser.add_argument("output_dir", help="folder for the files; made if it is not there")
    parser.add_argument(
        "--max_shard_size",
        default="5GB",
        help="largest file, such as 500MB; larger weights become several files",
    )
    parser.add_argument(
        "--safe_serialization", action="store_true", help="write safetensors files instead of torch's"
    )
    parser.add_argument(
        "-t", "--tag", help="which checkpoint, such as global_step14; default: what `latest` names"
    )
    parser.add_argument(
        "--exclude_frozen_parameters", action="store_true", help="leave out parameters that were not trained"
    )
    parser.add_argument("-d", "--debug", action="store_true", help="list every tensor, and show tracebacks")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status. What is wrong is one sentence, and status 2."""
    args = _parser().parse_args(argv)
    try:
        written = convert(
            args.checkpoint_dir,
            args.output_dir,
            args.max_shard_size,
            args.safe_serialization,
            args.tag,
            args.exclude_frozen_parameters,
        )
    except (XtrainError, OSError) as error:
        if args.debug:
            raise
        print(f"zero_to_fp32: error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, XtrainError) else 2
    for path, tensors in written.items():
        print(
            f"{path}: {len(tensors)} tensors, {sum(value.numel() for value in tensors.values()):,} elements"
        )
        for name, value in tensors.items() if args.debug else ():
            print(f"  {name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
