"""The report as text: for a terminal, as Markdown, and as JUnit XML."""

from __future__ import annotations

from io import StringIO
from xml.etree import ElementTree

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xtrain.align.alignment import Alignment
from xtrain.align.compare import Comparison
from xtrain.align.envelope import LOSS

MOST_DIFFERENCES = 20
_AROUND = 3  # steps shown on both sides of the first one outside


def _departed(alignment: Alignment) -> Comparison | None:
    """The losses, if they are outside somewhere, else the gradient norms, if those are."""
    judged = (outcome for outcome in (alignment.curve, alignment.norm) if outcome is not None)
    return next((outcome for outcome in judged if not outcome.aligned), None)


def _nearby(curve: Comparison) -> list[tuple[int, float, float, float, float]]:
    """(step, reference, candidate, relative difference, allowed) around the first step outside."""
    assert curve.first_outside is not None
    row = int(np.searchsorted(curve.step, curve.first_outside))
    rows = range(max(0, row - _AROUND), min(len(curve.step), row + _AROUND + 1))
    columns = (curve.step, curve.reference, curve.candidate, curve.difference, curve.limit)
    return [tuple(column[i].item() for column in columns) for i in rows]


def _cells(row: tuple[int, float, float, float, float]) -> list[str]:
    step, reference, candidate, difference, limit = row
    return [
        str(step),
        f"{reference:.8g}",
        f"{candidate:.8g}",
        f"{difference:.2e}",
        f"{limit:.2e}" if limit < float("inf") else "-",
    ]


_HEADINGS = ("step", "reference", "candidate", "relative difference", "allowed")


def headline(alignment: Alignment) -> str:
    """A few words."""
    if not alignment.aligned:
        return "not aligned"
    return "aligned as far as they were compared" if alignment.left_out else "aligned"


def module_lines(alignment: Alignment) -> list[str]:
    """What is known of the modules, one sentence each."""
    if alignment.modules is None:
        return []
    yet = alignment.curve is not None and alignment.aligned and alignment.modules.first is not None
    return [f"{'the losses agree, and yet ' if yet else ''}{alignment.modules.sentence()}"]


def print_report(alignment: Alignment, console: Console) -> None:
    """Show everything on a terminal."""

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    if alignment.differences:
        table = Table("setting", "reference", "candidate", title="differences", title_justify="left")
        for difference in alignment.differences[:MOST_DIFFERENCES]:
            table.add_row(
                *(Text(cell) for cell in (difference.key, difference.reference, difference.candidate))
            )
        console.print(table)
        if len(alignment.differences) > MOST_DIFFERENCES:
            say(f"and {len(alignment.differences) - MOST_DIFFERENCES} more")
    for note in alignment.notes:
        say(f"note: {note}", "dim")
    for sentence in alignment.left_out:
        say(f"caution: {sentence}", "yellow")
    if alignment.envelope is not None:
        say(alignment.envelope.sentence())
    say(f"{headline(alignment)}: {alignment.sentence()}", "bold green" if alignment.aligned else "bold red")
    if (curve := _departed(alignment)) is not None:
        table = Table(*_HEADINGS, title=None if curve.column == LOSS else "gradient norm")
        for row in _nearby(curve):
            table.add_row(*_cells(row), style="red" if row[0] == curve.first_outside else "")
        console.print(table)
    if alignment.curve is not None:
        for line in module_lines(alignment):
            say(line)
    for hint in alignment.hints:
        say(f"hint: {hint}", "yellow")


def escape(cell: str) -> str:
    """Text as a cell of a Markdown table."""
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def markdown_table(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table and an empty line."""
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    lines += ["| " + " | ".join(map(escape, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n\n"


def markdown(alignment: Alignment) -> str:
    """The report as a page."""
    out = StringIO()

    def table(headings: tuple[str, ...], rows: list[list[str]]) -> None:
        out.write(markdown_table(headings, rows))

    out.write(f"# Loss curves: {headline(alignment)}\n\n{escape(alignment.sentence())}.\n\n")
    table(
        ("", "file", "kind", "steps"),
        [
            [name, str(record.path), record.kind, str(len(record.step))]
            for name, record in (("reference", alignment.reference), ("candidate", alignment.candidate))
        ],
    )
    out.write(f"Policy: `{alignment.policy}`.")
    if alignment.envelope is not None:
        out.write(f" {alignment.envelope.sentence()}.")
    out.write("\n\n")
    if alignment.differences:
        out.write("## Differences of configuration and environment\n\n")
        table(
            ("setting", "reference", "candidate"),
            [[d.key, d.reference, d.candidate] for d in alignment.differences],
        )
    if (curve := _departed(alignment)) is not None:
        which = "" if curve.column == LOSS else ", gradient norm"
        out.write(f"## Around the first step outside{which}\n\n")
        table(_HEADINGS, [_cells(row) for row in _nearby(curve)])
    for title, lines in (
        ("Modules", module_lines(alignment)),
        ("Hints", alignment.hints),
        ("Cautions", alignment.left_out),
        ("Notes", alignment.notes),
    ):
        if lines:
            out.write(f"## {title}\n\n" + "".join(f"- {escape(line)}\n" for line in lines) + "\n")
    return out.getvalue().rstrip("\n") + "\n"


def junit(alignment: Alignment) -> str:
    """The report as JUnit XML: cases for losses, gradient norms, modules, and for what could not be compared."""
    cases = []
    if alignment.curve is not None:
        cases.append(("loss", alignment.curve.aligned, alignment.curve.sentence()))
    if alignment.norm is not None:
        cases.append(("gradient norm", alignment.norm.aligned, alignment.norm.sentence()))
    if alignment.modules is not None:
        # By other policies than the envelope modules only explain where there are losses.
        passed = alignment.aligned or alignment.modules.first is None
        cases.append(("modules", passed, alignment.modules.sentence()))
    if alignment.left_out:
        cases.append(("completeness", alignment.partial, "; ".join(alignment.left_out)))
    failures = sum(not passed for _, passed, _ in cases)
    suite = ElementTree.Element(
        "testsuite", name="xtrain align", tests=str(len(cases)), failures=str(failures), errors="0"
    )
    for name, passed, sentence in cases:
        case = ElementTree.SubElement(suite, "testcase", classname="xtrain.align", name=name)
        if not passed:
            failure = ElementTree.SubElement(case, "failure", message=_printable(sentence))
            failure.text = _printable("\n".join([sentence, *alignment.hints]))
        else:
            ElementTree.SubElement(case, "system-out").text = _printable(sentence)
    told = [] if alignment.envelope is None else [alignment.envelope.sentence()]
    told += [*alignment.notes, *(difference.sentence() for difference in alignment.differences)]
    text = _printable("\n".join(told))
    ElementTree.SubElement(suite, "system-out").text = text
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    """Without the control characters that XML forbids."""
    return "".join(character for character in text if character in "\n\t" or character >= " ")
