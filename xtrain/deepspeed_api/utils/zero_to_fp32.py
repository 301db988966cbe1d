"""`deepspeed.utils.zero_to_fp32`: see xtrain.checkpoint.export. As a program:

python -m xtrain.utils.zero_to_fp32 CHECKPOINT_DIR OUTPUT_DIR
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from xtrain.base.errors import XtrainError
from xtrain.checkpoint.export import (
    convert,
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)

__all__ = [
    "atoi",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "get_checkpoint_files",
    "get_fp32_state_dict_from_zero_checkpoint",
    "get_model_state_file",
    "get_model_state_files",
    "get_optim_files",
    "load_state_dict_from_zero_checkpoint",
    "natural_keys",
]


def atoi(text: str) -> int | str:
    """The number that a text is, else the text."""
    return int(text) if text.isdigit() else text


def natural_keys(text: str) -> list[int | str]:
    """A key for sorting by which `rank_10` comes after `rank_9`."""
    return [atoi(part) for part in re.split(r"(\d+)", text)]


def get_checkpoint_files(checkpoint_dir: str | Path, glob_pattern: str) -> list[str]:
    """Files of a folder in DeepSpeed's format, by number.

    Raises:
        FileNotFoundError: none is there.
    """
    found = sorted((str(path) for path in Path(checkpoint_dir).glob(glob_pattern)), key=natural_keys)
    if not found:
        raise FileNotFoundError(f"there are no files {glob_pattern!r} in {checkpoint_dir}")
    return found


def get_optim_files(checkpoint_dir: str | Path) -> list[str]:
    """The optimizer states of all ranks, in a checkpoint in DeepSpeed's format."""
    return get_checkpoint_files(checkpoint_dir, "*_optim_states.pt")


def get_model_state_files(checkpoint_dir: str | Path) -> list[str]:
    """The model states of all ranks, in a checkpoint in DeepSpeed's format."""
    return get_checkpoint_files(checkpoint_dir, "*_model_states.pt")


def get_model_state_file(checkpoint_dir: str | Path, zero_stage: int) -> str:
    """The first rank's model states, by the name that DeepSpeed gives them in this stage.

    Raises:
        FileNotFoundError: the folder or the file is not there.
    """
    if not Path(checkpoint_dir).is_dir():
        raise FileNotFoundError(f"{checkpoint_dir} is not a folder")
    name = "mp_rank_00_model_states.pt" if zero_stage <= 2 else "zero_pp_rank_0_mp_rank_00_model_states.pt"
    path = Path(checkpoint_dir) / name
    if not path.exists():
        raise FileNotFoundError(f"there is no file {name} in {checkpoint_dir}")
    return str(path)


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
