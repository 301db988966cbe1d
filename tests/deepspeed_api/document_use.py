"""The parts of docs/compat.md about DeepSpeed's own tests, and about what public repositories import."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.deepspeed_api import public_names
from tests.deepspeed_api.public_names import Outcome
from xtrain.base import stand_ins

HERE = Path(__file__).parent
_TESTS = """## DeepSpeed's own unit tests

Those of DeepSpeed's repository as of its version 0.19.6, on the host, once with deepspeed {version} and once with
`import deepspeed` meaning xtrain ({date}, torch 2.13.0; collected while defects were mended, not in one run on one
commit). Tests with many parameter sets were sampled, by the same draw for both. Only what
DeepSpeed itself passes on a host counts: most of its tests of fp16, profiling and activation checkpointing skip
themselves there. Of its {files} test files xtrain can import {importable}; {refused} end with the error that names a
feature, and {others} need a package that was not there.

| folder | run | DeepSpeed passes | of these xtrain | why not the rest |
| --- | ---: | ---: | ---: | --- |
"""
_NAMES = """## What public repositories import

{names} names that {repositories} public repositories import or touch, by their syntax trees
(`tests/deepspeed_api/public_names.py`, {date}). Counted once for each repository, **{share:.1f} %** can be imported:
{working:.1f} % are there, {standing:.1f} % stand in for a feature that is not there, so that a script which never uses
it runs, and say so when they are used. The others are refused at the import. Numbers are those of the repositories.

Repositories: {list}.
"""


def _read(name: str) -> dict[str, Any]:
    return dict(json.loads((HERE / name).read_text()))


def tests() -> list[str]:
    """A table by folder."""
    records = [_read("unit_tests_zero.json"), _read("unit_tests_other.json")]
    files = records[1]["files"]
    lines = [
        _TESTS.format(
            version=records[0]["deepspeed"],
            date=records[0]["date"],
            files=files["all"],
            importable=files["importable"],
            refused=files["refused_by_feature"],
            others=files["all"] - files["importable"] - files["refused_by_feature"],
        ).rstrip("\n")
    ]
    rows = {
        name.removeprefix("tests/unit/"): row for record in records for name, row in record["folders"].items()
    }
    for name, row in sorted(rows.items()):
        ours, theirs = row["xtrain_passes_of_those"], row["real_passes"]
        share = f" ({100 * ours / theirs:.0f} %)" if theirs else ""
        reasons = "; ".join(f"{reason}: {count}" for reason, count in row["reasons"].items())
        lines.append(f"| `{name}` | {row['run']} | {theirs} | {ours}{share} | {reasons} |")
    ours, theirs = (
        sum(row[key] for row in rows.values()) for key in ("xtrain_passes_of_those", "real_passes")
    )
    lines.append(
        f"| all | {sum(row['run'] for row in rows.values())} | {theirs} | {ours} ({100 * ours / theirs:.0f} %) | |"
    )
    return [*lines, ""]


def _stands_in(item: Outcome) -> bool:
    path = item.name.partition(".")[2]
    parts = [path.rsplit(".", count)[0] for count in range(path.count(".") + 1)]
    return any(stand_ins.kind(part) in ("function", "class", "torch module") for part in parts)


def _listed(items: list[Outcome]) -> str:
    return ", ".join(f"`{item.name.removeprefix('deepspeed.')}` {item.repositories}" for item in items)


def names() -> list[str]:
    """What is there, what stands in, and what is refused by which feature."""
    record, found = public_names.record(), public_names.outcomes()
    there = [item for item in found if item.there and not _stands_in(item)]
    standing = [item for item in found if item.there and _stands_in(item)]
    whole = sum(item.repositories for item in found)
    head = _NAMES.format(
        names=len(found),
        repositories=len(record["repositories"]),
        date=record["date"],
        share=public_names.share(found),
        working=100 * sum(item.repositories for item in there) / whole,
        standing=100 * sum(item.repositories for item in standing) / whole,
        list=", ".join(f"[{name}](https://github.com/{name})" for name in record["repositories"]),
    )
    lines = [head, "| names of `deepspeed`, and repositories | on xtrain |", "| --- | --- |"]
    lines += [
        f"| {_listed(there)} | there |",
        f"| {_listed(standing)} | can be imported; refused when used |",
    ]
    refused = defaultdict(list)
    for item in found:
        if not item.there:
            refused[item.said.partition("(")[2].partition(")")[0]].append(item)
    lines += [f"| {_listed(items)} | refused: {feature} |" for feature, items in refused.items()]
    gone = sorted(name for name, row in record["names"].items() if not row["in_deepspeed"])
    lines += ["", f"DeepSpeed {record['deepspeed']} itself has no longer, or cannot import on a host: "]
    return [
        *lines[:-1],
        lines[-1] + ", ".join(f"`{name.removeprefix('deepspeed.')}`" for name in gone) + ".",
        "",
    ]
