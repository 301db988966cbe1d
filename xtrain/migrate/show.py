"""Prints findings for people, grouped by verdict, and as JSON (docs/howto/migrate.md describes it)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape

from xtrain.migrate.verdict import Finding, Verdict

SCHEMA = 1
_STYLES = {
    Verdict.AS_IS: "green",
    Verdict.SHIM: "cyan",
    Verdict.CHANGE: "yellow",
    Verdict.UNSUPPORTED: "red",
}


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """How many findings have each verdict; all verdicts are there."""
    counted = Counter(finding.verdict for finding in findings)
    return {verdict.value: counted[verdict] for verdict in Verdict}


def document(path: str, findings: list[Finding], shown: list[Finding]) -> dict[str, Any]:
    """The findings as a JSON document."""
    return {
        "schema": SCHEMA,
        "path": path,
        "counts": counts(findings),
        "uses": [
            {
                "file": finding.use.file,
                "line": finding.use.line,
                "cell": finding.use.cell,
                "kind": finding.use.kind,
                "name": finding.use.name,
                "optional": finding.use.optional,
                "verdict": finding.verdict.value,
                "text": finding.text,
            }
            for finding in shown
        ],
    }


def _places(group: list[Finding]) -> str:
    """`a.py:3, 7; b.ipynb[2]:1`: lines by file and cell."""
    lines: dict[tuple[str, int | None], list[int]] = {}
    for finding in group:
        lines.setdefault((finding.use.file, finding.use.cell), []).append(finding.use.line)
    return "; ".join(
        f"{file}{'' if cell is None else f'[{cell}]'}:{', '.join(map(str, sorted(set(numbers))))}"
        for (file, cell), numbers in lines.items()
    )


def _named(finding: Finding) -> str:
    use = finding.use
    name = use.name
    if use.kind in ("unreadable", "config", "launch"):
        name = f"{use.kind}: {name}"
    elif use.kind == "library" and "deepspeed" not in name.lower():
        name = name.partition(".")[0]  # which part of it hardly matters
    return f"{name} (optional)" if use.optional else name


def show(console: Console, path: str, findings: list[Finding], shown: list[Finding]) -> None:
    """Print the findings, the serious ones last, and how many there are of each verdict."""
    for verdict in Verdict:
        groups: dict[tuple[str, str], list[Finding]] = {}
        for finding in shown:
            if finding.verdict is verdict:
                groups.setdefault((_named(finding), finding.text), []).append(finding)
        if not groups:
            continue
        number = sum(map(len, groups.values()))
        console.rule(f"[{_STYLES[verdict]}]{escape(verdict.title)}: {number}[/]", align="left")
        for (name, text), group in sorted(groups.items(), key=lambda item: item[0]):
            told = f": {escape(text)}" if text else ""
            console.print(f"[bold]{escape(name)}[/]{told}", soft_wrap=True, highlight=False)
            console.print(f"    {escape(_places(group))}", soft_wrap=True, highlight=False)
    total = counts(findings)
    console.rule(align="left")
    for verdict in Verdict:
        console.print(
            f"{total[verdict.value]:6}  [{_STYLES[verdict]}]{escape(verdict.title)}[/]", highlight=False
        )
    files = len({finding.use.file for finding in findings})
    console.print(
        f"{len(findings)} uses in {files} files of {escape(path)}. On NVIDIA's backend CUDA itself works as is.",
        soft_wrap=True,
        highlight=False,
    )


def as_json(path: str, findings: list[Finding], shown: list[Finding]) -> str:
    """The JSON document as text."""
    return json.dumps(document(path, findings, shown), indent=2)
