"""`xtrain launch`: compose, check, run, summarise."""

from __future__ import annotations

import argparse

from rich.console import Console

from xtrain.launch.carry_out import Draw, carry_out
from xtrain.launch.compose import compose_config
from xtrain.launch.describe import describe
from xtrain.launch.job import check_overrides_are_used, make_job, saved_overrides
from xtrain.launch.launchers import slurm
from xtrain.launch.sweep import run_sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xtrain launch`."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="Hydra overrides, such as model=glm_tiny"
    )
    parser.add_argument(
        "--config-dir", help="a folder with more choices: cluster/mine.yaml, model/mine.yaml, ..."
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    parser.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="run every combination of settings such as train.lr=0.1,0.2",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run what the folder of resume= says, although you did not write it",
    )


def run(args: argparse.Namespace, script_args: list[str], draw: Draw) -> int:
    """Carry out the command; returns the exit status. `draw` makes the picture of the loss when the run has ended."""
    console = Console()
    if args.multirun:
        return run_sweep(args.overrides, args.config_dir, script_args, args.debug)
    config, tree = compose_config(args.overrides, args.config_dir)
    # A resumed run starts from what its own command line said; what is said now comes after it and wins.
    saved = saved_overrides(config.resume, config.run_dir, args.overrides, args.trust)
    overrides = [*saved, *(item for item in args.overrides if item not in saved)]
    if overrides != args.overrides:
        config, tree = compose_config(overrides, args.config_dir)
    check_overrides_are_used(config, overrides)
    job = make_job(config, script_args)
    if args.dry_run:
        print(describe(job, slurm.launch_command(overrides, script_args, job, args.config_dir)))
        return 0
    # config.yaml is to say all that this run was started with: `xtrain align --bisect` starts it again.
    tree.script_args = [*config.script_args, *script_args]
    status, told = carry_out(job, tree, overrides, script_args, console, args.debug, args.config_dir, draw)
    if told:
        console.print(told, highlight=False, soft_wrap=True, markup=False)
    return status
