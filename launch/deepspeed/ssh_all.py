"""`ds_ssh`: one command on all hosts of a hostfile, by the system's ssh, side by side."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import threading
from typing import IO

from xtrain.base.errors import ConfigError, XtrainError
from xtrain.launch import hostfile


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ds_ssh",
        description="Run a command on all hosts of a hostfile; each line says which one it is from.",
    )
    parser.add_argument(
        "-f", "--hostfile", default=hostfile.DEFAULT, metavar="FILE", help="lines `HOST slots=NUMBER`"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what each host runs, in its shell")
    return parser


def _copy(host: str, lines: IO[str], to: IO[str]) -> None:
    for line in lines:
        to.write(f"{host}: {line.rstrip()}\n")
        to.flush()


def _start(host: str, command: str) -> tuple[subprocess.Popen[str], list[threading.Thread]]:
    process = subprocess.Popen(
        ["ssh", "-o", "BatchMode=yes", host, command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    assert process.stderr is not None
    copying = [
        threading.Thread(target=_copy, args=(host, lines, to))
        for lines, to in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]
    for thread in copying:
        thread.start()
    return process, copying


def run(hosts: list[str], command: str) -> int:
    """Run a command on the hosts; 0, or the status of the first host in the list on which it failed."""
    try:
        started = [_start(host, command) for host in hosts]
    except FileNotFoundError:
        raise ConfigError("there is no ssh on this machine: install the OpenSSH client") from None
    status = 0
    for host, (process, copying) in zip(hosts, started, strict=True):
        for thread in copying:
            thread.join()
        code = process.wait()
        if code:
            print(f"{host}: ended with status {code}", file=sys.stderr)
        status = status or code
    return status


def main(argv: list[str] | None = None) -> int:
    """Carry out the command; returns the exit status."""
    args = _options().parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    try:
        if not command:
            raise ConfigError("ds_ssh needs a command, as in `ds_ssh hostname`")
        hosts = hostfile.read(args.hostfile)
        if hosts is None:
            raise ConfigError(f"there is no hostfile {args.hostfile}: name one by -f")
        # One argument is a line of shell as it is; several are words.
        return run(list(hosts), command[0] if len(command) == 1 else shlex.join(command))
    except KeyboardInterrupt:  # ssh has got it as well
        return 130
    except XtrainError as error:
        print(f"ds_ssh: error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
