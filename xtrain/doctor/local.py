"""The doctor without a launcher: everything happens in processes that it starts on this host."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xtrain.base.errors import BackendError
from xtrain.doctor import event_log as diary
from xtrain.doctor import report, watch
from xtrain.doctor.ranks import Spec

Tell = Callable[[str], None]


def inventory(asked: str | None, patience: float, folder: Path) -> dict[str, Any]:
    """Versions, host, backends, libraries and the choice. A backend whose answer does not come is left out of the
    next try, and in the result with the reason.

    Raises:
        BackendError: not even a process without backends answers.
    """
    silent: dict[str, str] = {}
    while True:
        file = folder / f"inventory{len(silent)}.jsonl"
        skip = {"XTRAIN_DOCTOR_SKIP": ",".join(silent)}
        started = watch.start_inventory(file, asked, skip, folder / f"inventory{len(silent)}.log")
        outcome = started.follow(patience)
        lines = outcome.lines[0]
        if outcome.trouble is None:
            return _collected(lines, silent)
        what = diary.doing(lines)
        name = what.removeprefix("backend ")
        if not what.startswith("backend ") or name in silent:
            raise BackendError(f"the machine cannot be examined: {what}: {outcome.trouble}")
        silent[name] = f"asking it whether it is there {_without_ranks(outcome.trouble, patience)}"


def _without_ranks(trouble: str, patience: float) -> str:
    if trouble.startswith("hangs"):
        return f"has no answer within {patience:g} s"
    return "ends the process: " + trouble.removeprefix("rank 0 ").split(" in backend ")[0]


def _collected(lines: list[dict[str, Any]], silent: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"backends": [], "libraries": []}
    for line in lines:
        if line["kind"] in ("versions", "host", "selected"):
            found[line["kind"]] = line["answer"]
        elif line["kind"] == "backend":
            found["backends"].append(line["answer"])
        elif line["kind"] == "library":
            found["libraries"].append(line["answer"])
    for name, reason in silent.items():
        empty: dict[str, Any] = {"name": name, "source": "", "available": False, "reason": reason}
        empty |= {"library": None, "library_reason": None, "versions": {}, "devices": [], "dtypes": {}}
        found["backends"].append(empty)
        if found["selected"]["name"] == name:
            found["selected"]["reason"] = f"backend {name!r} cannot be used here: {reason}"
    found["backends"].sort(key=lambda entry: str(entry["name"]))
    return found


def plan(found: dict[str, Any], wanted: list[str]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Which (backend, library) to probe: the selected backend with every library for its device that is here, the
    others with their own; a pair of device type and library once.

    Args:
        wanted: names of libraries; empty means all.
    """
    available = [entry for entry in found["backends"] if entry["available"]]
    selected = found["selected"]["name"]
    available.sort(key=lambda entry: entry["name"] != selected)
    pairs, seen = [], set()
    for backend in available:
        mine = backend["name"] == selected
        libraries = sorted(found["libraries"], key=lambda one: one["name"] != backend["library"])
        for library in libraries:
            fits = backend["device_type"] in library["device_types"]
            key = (backend["device_type"], library["name"])
            own = library["name"] == backend["library"]
            if not library["available"] or key in seen or not (own or (mine and fits)):
                continue
            if not wanted or library["name"] in wanted:
                seen.add(key)
                pairs.append((backend, library))
    return pairs


def examine(
    asked: str | None, ranks: int, quick: bool, wanted: list[str], patience: float, tell: Tell
) -> dict[str, Any]:
    """The whole report. `tell` hears what is being done."""
    with tempfile.TemporaryDirectory(prefix="xtrain-doctor-") as name:
        folder = Path(name)
        tell("asking every backend")
        found = inventory(asked, patience, folder)
        probes = []
        for backend, library in plan(found, wanted):
            tell(f"backend {backend['name']}: {ranks} ranks probe {library['name']}")
            bandwidth = not quick and backend["name"] == found["selected"]["name"]
            spec = Spec(backend["name"], library["name"], bandwidth, patience)
            place = folder / f"{backend['name']}-{library['name']}"
            begun = time.monotonic()
            try:
                outcome = watch.start_ranks(spec, ranks, library["started_by"], place).follow(patience)
            except BackendError as error:
                outcome = watch.Outcome([], str(error))
            entry = report.probe_entry(backend, library["name"], ranks, outcome)
            probes.append({**entry, "seconds": time.monotonic() - begun})
    return report.finish({**found, "probes": probes})
