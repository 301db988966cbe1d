"""The report as one HTML file with everything in it: no script, no picture and no font from elsewhere.

Curves are drawn by uPlot (vendor/, MIT licence) with curves.js; without scripts there is a picture instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from xtrain.align.alignment import Alignment
from xtrain.align.compare import Comparison
from xtrain.align.modules import ModuleComparison
from xtrain.align.plot import COLOURS, GREY, curves_svg, name_of
from xtrain.align.record import Floats
from xtrain.align.text import headline, module_lines

_WIDTH = 900
_MOST_POINTS = 2000
_MOST_SNAPSHOTS = 150
_MOST_MODULES = 200

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse } td, th { border: 1px solid #ccc; padding: .2em .6em; text-align: left }
td { overflow-wrap: anywhere } .verdict { padding: .6em 1em; border-left: 6px solid } .yes { border-color: #009E73 }
.no { border-color: #D55E00 } svg { width: 100%; height: auto } text { font: 11px system-ui, sans-serif; fill: #444 }
.u-legend td, .u-legend th { border: none } .u-title { font-size: 1em } .uplot { margin-bottom: 1em }
"""


def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _shown(curve: Comparison) -> Comparison:
    """What a screen can show: not too many steps, but the first one outside; only what has a logarithm."""
    rows = np.linspace(0, len(curve.step) - 1, min(len(curve.step), _MOST_POINTS)).astype(np.int64)
    if curve.first_outside is not None:
        rows = np.union1d(rows, np.searchsorted(curve.step, [curve.first_outside]))
    columns = ("step", "reference", "candidate", "centre")
    shown: dict[str, Any] = {name: getattr(curve, name)[rows] for name in columns}
    for name, values in (("difference", curve.difference), ("limit", curve.limit)):
        shown[name] = np.where(values > 0, values, np.nan)[rows]
    return replace(curve, **shown)


def _line(label: str, values: Floats, colour: str, *dash: int) -> dict[str, Any]:
    """A line of a chart; interrupted where values are not finite."""
    numbers = [float(value) if math.isfinite(value) else None for value in values]
    return {"label": label, "colour": colour, "dash": dash, "values": numbers}


def _charts(curve: Comparison, place: str) -> dict[str, Any]:
    """What curves.js draws for one column of the records: curves, their ratio, their difference."""
    blue, red, *_ = COLOURS
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = curve.candidate / curve.reference
    low, high = curve.allowed()
    allowed = [_line("allowed from", low, blue), _line("allowed up to", high, blue)]
    drawn = [
        _line("reference", curve.reference, blue),
        _line("candidate", curve.candidate, red, 6, 4),
    ]
    ratios = [_line("one", np.ones(len(ratio)), blue), _line("ratio", ratio, GREY)]
    apart = [_line("allowed", curve.limit, blue), _line("relative difference", curve.difference, GREY)]
    has_band = curve.policy.kind in ("relative", "envelope")
    logarithmic = bool(np.isfinite([curve.limit, curve.difference]).any())
    charts = [
        (name_of(curve), 320, False, allowed if has_band else [], drawn),
        ("candidate / reference", 200, False, [], ratios),
        ("relative difference, and what is allowed", 220, logarithmic, [], apart),
    ]
    names = ("title", "height", "log", "band", "lines")
    return {
        "place": place,
        "step": curve.step.tolist(),
        "outside": curve.first_outside,
        "charts": [dict(zip(names, chart, strict=True)) for chart in charts],
    }


def _curves(alignment: Alignment) -> str:
    """Places for the curves, pictures for readers without scripts, and the script with its data."""
    judged = (("Curves", alignment.curve), ("Gradient norms", alignment.norm))
    found = [(heading, _shown(curve)) for heading, curve in judged if curve is not None]
    if not found:
        return ""
    data = json.dumps([_charts(curve, curve.column) for _, curve in found], allow_nan=False)
    data = data.replace("<", "\\u003c")  # "</script>" would end the script
    return "".join(
        [
            *(
                f"<h2>{heading}</h2><div id='{curve.column}'></div><noscript>{curves_svg(curve)}</noscript>"
                for heading, curve in found
            ),
            f"<script type='application/json' id='curves'>{data}</script>",
            f"<script>/* uPlot:\n{_file('vendor/uPlot.LICENSE')}*/\n{_file('vendor/uPlot.iife.min.js')}</script>",
            f"<script>{_file('curves.js')}</script>",
        ]
    )


def _colour(heat: float) -> str:
    """White up to a hundredth of what is allowed, blue up to all of it, red beyond; in few shades."""
    if np.isnan(heat):
        return "#eee"
    if heat > 1:
        shade = round(4 * min(1.0, 0.3 + np.log10(min(heat, 1e30)) / 3)) / 4
        return f"rgb(213,{int(190 * (1 - shade)) + 40},{int(190 * (1 - shade)) + 10})"
    shade = round(4 * max(0.0, 1 + np.log10(max(heat, 1e-9)) / 2)) / 4
    return f"rgb({int(255 - 150 * shade)},{int(255 - 80 * shade)},255)"


def _heat_map(modules: ModuleComparison, phase: str) -> str:
    steps, heat = modules.heat[phase]
    names = modules.names
    left = ""
    if len(names) > _MOST_MODULES:
        # Those that depart most.
        worst = np.argsort(-np.nan_to_num(np.fmax.reduce(heat, axis=0), posinf=3e38))[:_MOST_MODULES]
        chosen = np.sort(worst)
        left = f" ({len(names) - len(chosen)} quieter modules are left out)"
        heat, names = heat[:, chosen], [names[index] for index in chosen]
    starts = np.unique(np.linspace(0, len(steps), min(len(steps), _MOST_SNAPSHOTS) + 1).astype(int))[:-1]
    columns = np.fmax.reduceat(heat, starts, axis=0)
    row, margin = 12, 260
    width = (_WIDTH - margin - 10) / len(starts)
    height = row * len(names) + 30
    out = [f"<h2>Phase {phase}{left}</h2>"]
    out.append(f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="heat map of phase {phase}">')
    for index, name in enumerate(names):
        label = name if len(name) <= 42 else "…" + name[-41:]
        out.append(f'<text x="{margin - 6}" y="{index * row + 10}" text-anchor="end">{escape(label)}</text>')
        colours = [_colour(float(value)) for value in columns[:, index]]
        column = 0
        for colour, run in groupby(colours):
            cells = len(list(run))
            x = margin + column * width
            out.append(
                f'<rect x="{x:.1f}" y="{index * row}" width="{cells * width + 0.2:.1f}" height="{row}" '
                f'fill="{colour}"/>'
            )
            column += cells
    y = row * len(names) + 18
    out.append(f'<text x="{margin}" y="{y}">step {steps[0]}</text>')
    out.append(f'<text x="{_WIDTH - 10}" y="{y}" text-anchor="end">step {steps[-1]}</text></svg>')
    return "".join(out)


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _list(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    return f"<h2>{title}</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def html(alignment: Alignment) -> str:
    """The report as a page."""
    title = f"Loss curves: {headline(alignment)}"
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title><style>{_STYLE}",
        f"{_file('vendor/uPlot.min.css')}</style>",
        f"</head><body><h1>{title}</h1>",
        f"<p class='verdict {'no' if alignment.exit_code else 'yes'}'>{escape(alignment.sentence())}.</p>",
        f"<p>Policy {escape(str(alignment.policy))}.",
        "" if alignment.envelope is None else f" {escape(alignment.envelope.sentence())}.",
        "</p>",
        _table(
            ("", "file", "kind", "steps"),
            [
                (name, str(record.path), record.kind, str(len(record.step)))
                for name, record in (("reference", alignment.reference), ("candidate", alignment.candidate))
            ],
        ),
        _list("Cautions", alignment.left_out),
        _list("Hints", alignment.hints),
        _list("Modules", module_lines(alignment)),
    ]
    if alignment.differences:
        parts.append("<h2>Differences of configuration and environment</h2>")
        rows = [(d.key, d.reference, d.candidate) for d in alignment.differences]
        parts.append(_table(("setting", "reference", "candidate"), rows))
    parts.append(_curves(alignment))
    if alignment.modules is not None:
        parts.append(
            "<p>Blue: within what is allowed; red: beyond it; white: far within; grey: not measured.</p>"
        )
        parts += [_heat_map(alignment.modules, phase) for phase in alignment.modules.heat]
    parts += [_list("Notes", alignment.notes), "</body></html>\n"]
    return "".join(parts)
