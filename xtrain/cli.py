"""The `xtrain` command. Imports no torch: a mistake is answered at once."""

from __future__ import annotations

import argparse
import sys

from xtrain.base.errors import XtrainError
from xtrain.version import __version__


def _parser() -> argparse.ArgumentParser:
    from xtrain.align import main as align
    from xtrain.doctor import main as doctor
    from xtrain.launch import main as launch
    from xtrain.launch.deepspeed import shims
    from xtrain.migrate import main as migrate

    parser = argparse.ArgumentParser(prog="xtrain", description="DeepSpeed scripts on every accelerator")
    parser.add_argument("--version", action="version", version=f"xtrain {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module, text in (
        ("launch", launch, "start ranks: xtrain launch model=glm_tiny train.steps=100 [-- script args]"),
        ("align", align, "compare the loss curves of two runs"),
        (
            "doctor",
            doctor,
            "what is here, what is not and why, and whether collectives give the right numbers",
        ),
        (
            "migrate",
            migrate,
            "read a repository, and say of every use of DeepSpeed, CUDA and apex what becomes of it",
        ),
        ("shims", shims, "write the commands deepspeed, ds_report, ds_ssh, ... into a folder for the PATH"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        module.add_arguments(command)
    # Only named here: main() hands it on before anything is parsed.
    commands.add_parser(
        "deepspeed", help="start a script as DeepSpeed's command does: xtrain deepspeed train.py ..."
    )
    commands.add_parser(
        "run", help="run a script, unchanged, with xtrain for deepspeed and apex: xtrain run train.py ..."
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status. Errors of the user are one sentence and status 2."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["deepspeed"]:  # its options are DeepSpeed's, and the script's arguments stay as they are
        from xtrain.launch.deepspeed import command as deepspeed_command

        return deepspeed_command.command_line(given[1:])
    if given[:1] == ["run"]:  # the script's arguments stay as they are, here too
        from xtrain.shims import run

        try:
            return run.command_line(given[1:])
        except XtrainError as error:
            print(f"xtrain: error: {error}", file=sys.stderr)
            return error.exit_code
    from xtrain.align import main as align
    from xtrain.align.plot import draw_record
    from xtrain.doctor import main as doctor
    from xtrain.launch import main as launch
    from xtrain.launch.deepspeed import shims
    from xtrain.migrate import main as migrate

    ours, separator, script_args = given, "", []
    if "--" in given:
        cut = given.index("--")
        ours, separator, script_args = given[:cut], "--", given[cut + 1 :]
    parser = _parser()
    # Overrides and options may come in any order, which argparse's subcommands cannot do alone.
    args, extras = parser.parse_known_args(ours)
    several = {"launch": "overrides", "align": "paths"}.get(args.command)
    if several is not None:
        getattr(args, several).extend(extra for extra in extras if not extra.startswith("-"))
        extras = [extra for extra in extras if extra.startswith("-")]
    if extras:
        parser.error(f"unrecognized arguments: {' '.join(extras)}")
    try:
        if args.command == "launch":
            return launch.run(args, script_args, draw_record)
        if args.command == "align":
            return align.run(args, script_args if separator else None)
        if separator:
            raise XtrainError(f"`--` has no meaning for xtrain {args.command}")
        return {"shims": shims, "migrate": migrate, "doctor": doctor}[args.command].run(args)
    except KeyboardInterrupt:  # outside the supervised run, which handles it itself
        print("xtrain: interrupted", file=sys.stderr)
        return 130
    except XtrainError as error:
        if args.debug:
            raise
        print(f"xtrain: error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
