"""The report for people, with rich."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_CELLS = {"ok": "[green]ok[/]", "wrong": "[bold red]WRONG[/]", "refused": "[dim]-[/]"}


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _backends(console: Console, report: dict[str, Any]) -> None:
    table = Table(title="backends", title_justify="left", show_edge=False)
    for heading in ("name", "from", "devices", "dtypes", "library", "versions"):
        table.add_column(heading, overflow="fold")
    missing = []
    for entry in report["backends"]:
        if not entry["available"]:
            missing.append(f"backend {entry['name']!r} is not available: {entry['reason']}")
            continue
        devices = entry["devices"]
        first = f"{devices[0]['name']}, {_size(devices[0]['memory_bytes'])}" if devices else "none"
        count = f"{len(devices)} x " if devices and devices[0]["index"] is not None else ""
        dtypes = ", ".join(
            name if how == "native" else f"{name} ({how})" for name, how in entry["dtypes"].items()
        )
        library = entry["library"] + (" (not here)" if entry["library_reason"] else "")
        versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
        mark = " *" if entry["name"] == report["selected"]["name"] else ""
        table.add_row(entry["name"] + mark, entry["source"], count + first, dtypes, library, versions)
    console.print(table)
    for text in missing:
        _line(console, text, "yellow")
    for entry in report["backends"]:
        if entry["available"] and entry["library_reason"]:
            _line(
                console,
                f"backend {entry['name']!r} has no {entry['library']}: {entry['library_reason']}",
                "yellow",
            )


def _libraries(console: Console, report: dict[str, Any]) -> None:
    parts = []
    for entry in report["libraries"]:
        if entry["available"]:
            version = f" ({entry['version']})" if entry["version"] else ""
            parts.append(f"{entry['name']}{version}")
    _line(console, "\nprocess-group libraries: " + (", ".join(parts) or "none"))
    for entry in report["libraries"]:
        if not entry["available"]:
            _line(console, f"library {entry['name']!r} is not available: {entry['reason']}", "yellow")


def _probe(console: Console, probe: dict[str, Any]) -> None:
    seconds = f", {probe['seconds']:.1f} s" if "seconds" in probe else ""
    title = f"backend {probe['backend']}, library {probe['library']}, {probe['ranks']} ranks{seconds}"
    dtypes = list(dict.fromkeys(dtype for row in probe["results"].values() for dtype in row if dtype))
    table = Table(title=f"\n{title}", title_justify="left", show_edge=False)
    table.add_column("collective", no_wrap=True)
    for dtype in dtypes:
        short = dtype.replace("float", "f").replace("uint", "u").replace("int", "i")
        table.add_column(short, justify="center")
    for collective, row in probe["results"].items():
        if "" not in row:
            cells = [_CELLS[row[dtype]["state"]] if dtype in row else "" for dtype in dtypes]
            table.add_row(collective, *cells)
    if probe["results"]:
        console.print(table)
        plain = [f"{name} {row['']['state']}" for name, row in probe["results"].items() if "" in row]
        _line(console, f'{", ".join(plain)}; "-": refused by the library')
    else:
        _line(console, f"\n{title}")
    for problem in probe["problems"]:
        _line(console, problem, "bold red")
    if probe["bandwidth"]:
        _bandwidth(console, probe["bandwidth"])


def _bandwidth(console: Console, entries: list[dict[str, Any]]) -> None:
    copy = next((e["bytes_per_second"] for e in entries if e["operation"] == "memory copy"), None)
    table = Table(title="\nbandwidth, all ranks at once", title_justify="left", show_edge=False)
    for heading in ("operation", "size", "time", "bus bandwidth", "of the memory copy"):
        table.add_column(heading, justify="left" if heading == "operation" else "right")
    for entry in entries:
        share = "" if not copy else f"{100 * entry['bytes_per_second'] / copy:.0f} %"
        table.add_row(
            entry["operation"],
            _size(entry["bytes"]),
            f"{1000 * entry['seconds']:.3g} ms",
            f"{entry['bytes_per_second'] / 1e9:.3g} GB/s",
            share,
        )
    console.print(table)


def show(report: dict[str, Any], console: Console) -> None:
    """Print everything, the verdict last."""
    host, versions = report["host"], report["versions"]
    there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    _line(console, there)
    _line(
        console,
        f"{host['name']}: {host['processor']}, {host['cores']} cores, {_size(host['memory_bytes'])}, "
        f"{host['system']} {host['machine']}\n",
    )
    _backends(console, report)
    _libraries(console, report)
    for probe in report["probes"]:
        _probe(console, probe)
    selected = report["selected"]
    _line(console, "")
    if report["ok"]:
        extent = "" if report["probes"] else " (no collective was probed)"
        _line(console, f"backend {selected['name']!r} (by {selected['by']}) is well{extent}", "bold green")
    for problem in report["problems"]:
        _line(console, f"xtrain: error: {problem}", "bold red")
