"""`xtrain align --bisect GOOD BAD`: what the user asks for, and the answer in words."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path

from xtrain.align.alignment import POLICY, find_envelope
from xtrain.align.bisection import Bisection, Cause
from xtrain.align.changes import find_changes, make_settings
from xtrain.align.compare import Policy, no_envelope
from xtrain.align.text import escape, markdown_table
from xtrain.align.trials import Trials, read_configurations
from xtrain.base.errors import ConfigError, RecordError
from xtrain.base.files import write_text

_REFUSED = ("runs", "perturbation", "false_alarms", "loss", "plot", "shift", "html", "junit")


def _sentences(cause: Cause, first: bool) -> list[str]:
    found = cause.verdict.alignment
    assert found is not None
    start = "the departure comes from" if first else "and, on its own, from"
    together = " these together" if len(cause.settings) > 1 else ""
    what = ", and ".join(setting.sentence() for setting in cause.settings)
    said = [f"{start}{together}: {what}", f"first step outside: {found.began}"]
    if cause.unresolved:
        numbers = ", ".join(str(verdict.number) for verdict in cause.unresolved)
        said.append(f"fewer of them may be enough, as not every smaller set could be judged: trial {numbers}")
    return said


def answer(bisection: Bisection) -> list[str]:
    """The result of a search, a sentence a line."""
    said: list[str] = []
    for cause in bisection.causes:
        said += _sentences(cause, first=not said)
    if not said:
        said.append("the curves agree: there is no departure to explain")
    if bisection.rest is not None:
        them = "it" if sum(len(cause.settings) for cause in bisection.causes) == 1 else "them"
        rest = bisection.rest
        outcome = "agrees with GOOD" if rest.alignment is not None else f"cannot be judged: {rest.unresolved}"
        said.append(f"without {them} BAD {outcome}")
    kept = sum(verdict.trial.kept for verdict in bisection.verdicts)
    earlier = f" ({kept} of them from an earlier search)" if kept else ""
    said.append(
        f"{len(bisection.verdicts)} trials{earlier}, policy {bisection.policy}, kept in {bisection.trials.folder}"
    )
    return said


def markdown(bisection: Bisection) -> str:
    """The report as a page."""
    settings = [
        [change.name if change is setting.changes[0] else f"{change.name}, with it", *change.values()]
        for setting in bisection.settings
        for change in setting.changes
    ]
    trials = [
        [str(verdict.number), verdict.label, verdict.words(), verdict.trial.folder.name]
        for verdict in bisection.verdicts
    ]
    return (
        "# Which setting is it?\n\n"
        + "".join(f"- {escape(line)}\n" for line in answer(bisection))
        + f"\nGOOD is `{bisection.good.path}`, BAD is `{bisection.bad.path}`.\n\n## Settings that differ\n\n"
        + markdown_table(("setting", "GOOD", "BAD"), settings)
        + "## Trials\n\n"
        + markdown_table(("", "what was run", "outcome", "folder"), trials).rstrip("\n")
        + "\n"
    )


def _start(args: argparse.Namespace, command: list[str] | None) -> Bisection:
    """Check everything that can be checked before a run."""
    for option in _REFUSED:
        if getattr(args, option) is not None:
            raise RecordError(f"--{option.replace('_', '-')} has no meaning with --bisect")
    if args.partial:
        raise RecordError("--partial has no meaning with --bisect, where runs have the same steps")
    policy = Policy.parse(args.policy or POLICY)
    if args.envelope is not None and policy.kind != "envelope":
        raise RecordError(f"--envelope {args.envelope} is for --policy envelope, and the policy is {policy}")
    if args.markdown is not None and not Path(args.markdown).parent.is_dir():
        raise RecordError(f"--markdown {args.markdown}: there is no folder {Path(args.markdown).parent}")
    good, bad, runner = read_configurations(args.paths, command, args.trust)
    envelope = find_envelope(good.path, args.envelope) if policy.kind == "envelope" else None
    if policy.kind == "envelope" and envelope is None:
        raise no_envelope()
    settings = make_settings(find_changes(good.tree, bad.tree), runner.sources)
    if not settings:
        raise ConfigError(f"{good.path} and {bad.path} have the same settings: there is nothing to search")
    # What an earlier search found is used when it is asked for: a script may have changed since.
    folder = args.output or f"runs/bisect_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    return Bisection(good, bad, settings, Trials(Path(folder), runner), policy, envelope)


def run(args: argparse.Namespace, command: list[str] | None) -> int:
    """Exit status 0: they agree, 1: the departure is explained; errors (2) are raised."""
    bisection = _start(args, command)
    settings = bisection.settings
    print("1 setting differs:" if len(settings) == 1 else f"{len(settings)} settings differ:")
    for setting in settings:
        print(f"     {setting.sentence()}")
    with bisection.trials.lock():
        try:
            found = bisection.search()
        except KeyboardInterrupt:
            print(f"stopped; the same command with -o {bisection.trials.folder} goes on from here")
            raise
    print("\n".join(answer(bisection)))
    if args.markdown:
        try:
            write_text(Path(args.markdown), markdown(bisection))
        except OSError as error:
            raise RecordError(f"{args.markdown} cannot be written: {error.strerror}") from None
        print(f"report: {args.markdown}")
    return 1 if found else 0
