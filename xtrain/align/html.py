"""The report as one HTML file with everything in it: no script, no picture and no font from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

import numpy as np
import numpy.typing as npt

from xtrain.align.alignment import Alignment
from xtrain.align.compare import Comparison
from xtrain.align.modules import ModuleComparison
from xtrain.align.plot import COLOURS
from xtrain.align.record import Floats
from xtrain.align.text import headline, module_lines

_WIDTH, _LEFT = 900, 70
_MOST_POINTS = 1200
_MOST_SNAPSHOTS = 150
_MOST_MODULES = 200

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse } td, th { border: 1px solid #ccc; padding: .2em .6em; text-align: left }
td { overflow-wrap: anywhere } .verdict { padding: .6em 1em; border-left: 6px solid } .yes { border-color: #009E73 }
.no { border-color: #D55E00 } svg { width: 100%; height: auto } text { font: 11px system-ui, sans-serif; fill: #444 }
"""


def _thin(rows: int) -> npt.NDArray[np.int64]:
    """Rows to draw: all, or so many that a screen can show."""
    return np.unique(np.linspace(0, rows - 1, min(rows, _MOST_POINTS)).astype(np.int64))


class _Axes:
    """A coordinate system in SVG: data on the left, pixels on the right."""

    def __init__(
        self, step: Floats, values: list[Floats], height: int, title: str, log: bool = False
    ) -> None:
        self.height, self.title, self.log = height, title, log
        shown = np.concatenate([self._scaled(np.asarray(value, np.float64)) for value in values])
        shown = shown[np.isfinite(shown)]
        self.low, self.high = (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 1.0)
        if self.high - self.low < 1e-12 * max(abs(self.high), 1e-300):
            pad = abs(self.high) * 0.01 or 1.0
            self.low, self.high = self.low - pad, self.high + pad
        self.first, self.last = float(step[0]), float(max(step[-1], step[0] + 1))
        self.parts: list[str] = []

    def _scaled(self, values: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.log10(values) if self.log else values)

    def x(self, step: Floats) -> Floats:
        return np.asarray(_LEFT + (step - self.first) / (self.last - self.first) * (_WIDTH - _LEFT - 10))

    def y(self, values: Floats) -> Floats:
        part = (self._scaled(values) - self.low) / (self.high - self.low)
        return np.asarray(10 + (1 - part) * (self.height - 40))

    def line(self, step: Floats, values: Floats, colour: str, dashes: str = "") -> None:
        """A polyline, interrupted where values are not finite."""
        with np.errstate(invalid="ignore"):
            heights = self.y(np.asarray(values, np.float64))
        path, drawing = [], False
        for x, y in zip(self.x(step), heights, strict=True):
            if np.isfinite(y):
                path.append(f"{'L' if drawing else 'M'}{x:.1f} {y:.1f}")
            drawing = bool(np.isfinite(y))
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        self.parts.append(
            f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="1.4"{dash}/>'
        )

    def band(self, step: Floats, low: Floats, high: Floats, colour: str) -> None:
        """A filled area, where both borders are finite."""
        good = np.isfinite(low) & np.isfinite(high)
        if not good.any():
            return
        x = self.x(step[good])
        upper = [f"{a:.1f},{b:.1f}" for a, b in zip(x, self.y(high[good]), strict=True)]
        lower = [f"{a:.1f},{b:.1f}" for a, b in zip(x, self.y(low[good]), strict=True)]
        points = " ".join(upper + lower[::-1])
        self.parts.append(f'<polygon points="{points}" fill="{colour}" fill-opacity="0.2"/>')

    def mark(self, step: float, colour: str) -> None:
        """A vertical line."""
        x = float(self.x(np.array([step]))[0])
        self.parts.append(
            f'<path d="M{x:.1f} 10V{self.height - 30}" stroke="{colour}" stroke-width="1" stroke-dasharray="2 3"/>'
        )

    def svg(self) -> str:
        """The drawing with its frame and labels."""
        out = [f'<svg viewBox="0 0 {_WIDTH} {self.height}" role="img" aria-label="{escape(self.title)}">']
        for part in (0.0, 0.5, 1.0):
            value = self.low + part * (self.high - self.low)
            y = 10 + (1 - part) * (self.height - 40)
            label = f"{10**value:.1e}" if self.log else f"{value:.5g}"
            out.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - 10}" stroke="#ddd"/>')
            out.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        for step, anchor, x in ((self.first, "start", _LEFT), (self.last, "end", _WIDTH - 10)):
            out.append(f'<text x="{x}" y="{self.height - 12}" text-anchor="{anchor}">step {step:g}</text>')
        middle = (_LEFT + _WIDTH) / 2
        out.append(
            f'<text x="{middle}" y="{self.height - 12}" text-anchor="middle">{escape(self.title)}</text>'
        )
        return "".join([*out, *self.parts, "</svg>"])


def _curves(curve: Comparison) -> str:
    rows = _thin(len(curve.step))
    if curve.first_outside is not None:
        rows = np.union1d(rows, np.searchsorted(curve.step, [curve.first_outside]))
    step = curve.step[rows].astype(np.float64)
    reference, candidate = curve.reference[rows], curve.candidate[rows]
    limit = np.where(np.isfinite(curve.limit[rows]), curve.limit[rows], np.nan)
    name = curve.column.replace("_", " ").replace("grad", "gradient")
    loss = _Axes(step, [reference, candidate], 320, f"{name}: reference solid, candidate dashed")
    if curve.policy.kind in ("relative", "envelope"):
        # Cut to what is shown: a wide envelope is not to flatten the curves.
        span = loss.high - loss.low
        lower, upper = (np.clip(edge[rows], loss.low - span, loss.high + span) for edge in curve.allowed())
        loss.band(step, lower, upper, COLOURS[0])
    loss.line(step, reference, COLOURS[0])
    loss.line(step, candidate, COLOURS[1], "5 3")
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = candidate / reference
    ratio = _Axes(step, [quotient, np.ones(1)], 160, "candidate / reference")
    ratio.line(step, np.ones(len(step)), COLOURS[0])
    ratio.line(step, quotient, "#555")
    difference = np.where(curve.difference[rows] > 0, curve.difference[rows], np.nan)
    positive = np.where(limit > 0, limit, np.nan)
    apart = _Axes(
        step, [difference, positive], 180, "relative difference, and what is allowed (blue)", log=True
    )
    apart.line(step, positive, COLOURS[0])
    apart.line(step, difference, "#555")
    charts = [loss, ratio, apart]
    if curve.first_outside is not None:
        for chart in charts:
            chart.mark(curve.first_outside, COLOURS[1])
    return "".join(chart.svg() for chart in charts)


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
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>",
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
    if alignment.curve is not None:
        parts += ["<h2>Curves</h2>", _curves(alignment.curve)]
    if alignment.norm is not None:
        parts += ["<h2>Gradient norms</h2>", _curves(alignment.norm)]
    if alignment.modules is not None:
        parts.append(
            "<p>Blue: within what is allowed; red: beyond it; white: far within; grey: not measured.</p>"
        )
        parts += [_heat_map(alignment.modules, phase) for phase in alignment.modules.heat]
    parts += [_list("Notes", alignment.notes), "</body></html>\n"]
    return "".join(parts)
