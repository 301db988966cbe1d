"""The report as plain data: what `xtrain doctor --json` prints, and what its exit status follows from.

docs/doctor.md describes every key; a key is never renamed or removed while SCHEMA stays the same.
"""

from __future__ import annotations

from typing import Any

from xtrain.doctor.follow import Outcome

SCHEMA = 1
_WORST_FIRST = ("wrong", "refused", "ok")
_ADDS = ("all_reduce sum", "SliceSum")
_MOVES = ("broadcast", "SliceGather")
_ALWAYS = (
    ("objects", ""), ("barrier", ""), ("broadcast", "uint8"), ("CanonicalAllReduce", "float32"),
)  # fmt: skip


def needed(collective: str, dtype: str, native: list[str]) -> bool:
    """Whether training on a device that computes in the dtypes `native` relies on it. What a library lacks besides
    is told, and is no failure."""
    return (collective, dtype) in _ALWAYS or (dtype in native and collective in (*_ADDS, *_MOVES))


def _merged(lines: list[list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """collective -> dtype -> state, why and (where they do not all agree) the ranks that say so."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for rank, one in enumerate(lines):
        for line in one:
            if line["kind"] == "probe":
                found.setdefault((line["name"], line["dtype"]), {})[rank] = line
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for (name, dtype), answers in found.items():
        state = next(s for s in _WORST_FIRST if any(a["state"] == s for a in answers.values()))
        ranks = [rank for rank, answer in answers.items() if answer["state"] == state]
        entry: dict[str, Any] = {"state": state, "why": answers[ranks[0]]["why"]}
        if len(ranks) < len(lines):
            entry["ranks"] = ranks
        results.setdefault(name, {})[dtype] = entry
    return results


def _slowest(lines: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each measurement, the rank that took longest."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for one in lines:
        for line in one:
            if line["kind"] == "bandwidth":
                key = line["operation"], line["bytes"]
                if key not in found or line["seconds"] > found[key]["seconds"]:
                    found[key] = {name: value for name, value in line.items() if name != "kind"}
    return list(found.values())


def probe_entry(backend: dict[str, Any], library: str, ranks: int, outcome: Outcome) -> dict[str, Any]:
    """What came of one probe: `problems` are sentences, and `ok` says that there are none."""
    results = _merged(outcome.lines)
    native = [name for name, how in backend["dtypes"].items() if how == "native"]
    place = f"backend {backend['name']}, library {library}"
    problems = [] if outcome.trouble is None else [f"{place}: {outcome.trouble}"]
    for collective, by_dtype in results.items():
        for dtype, entry in by_dtype.items():
            what = f"{collective} of {dtype}" if dtype else collective
            who = f" on rank {', '.join(map(str, entry['ranks']))}" if "ranks" in entry else ""
            if entry["state"] == "wrong":
                problems.append(f"{place}: {what} gives wrong results{who}: {entry['why']}")
            elif (
                entry["state"] == "refused" and outcome.trouble is None and needed(collective, dtype, native)
            ):
                problems.append(f"{place}: {what} is refused{who}, and training needs it: {entry['why']}")
    return {
        "backend": backend["name"],
        "library": library,
        "ranks": ranks,
        "ok": not problems,
        "problems": problems,
        "results": results,
        "bandwidth": _slowest(outcome.lines),
    }


def _selected_problems(report: dict[str, Any]) -> list[str]:
    """Why the selected backend cannot be relied on here."""
    selected = report["selected"]
    if selected["reason"] is not None:
        return [selected["reason"]]
    entry = next(one for one in report["backends"] if one["name"] == selected["name"])
    if not entry["available"]:
        return [f"backend {entry['name']!r} cannot be used here: {entry['reason']}"]
    if entry["library_reason"] is not None:
        return [f"backend {entry['name']!r} has no {entry['library']} here: {entry['library_reason']}"]
    probes = [one for one in report["probes"] if one["backend"] == entry["name"]]
    own = [one for one in probes if one["library"] == entry["library"]]
    if not own and probes:  # --library asked for others only
        own = probes
    return [problem for one in own for problem in one["problems"]]


def finish(report: dict[str, Any]) -> dict[str, Any]:
    """The report with the verdict: `problems` of the selected backend and its library, and `ok`."""
    problems = _selected_problems(report)
    return {"schema": SCHEMA, "ok": not problems, "problems": problems, **report}
