"""A corpus that is the same on every machine: program-like text from a small grammar.

Python's own generator is used with its documented, stable `random()`; nothing is downloaded and no
file is shipped.
"""

from __future__ import annotations

import random
from pathlib import Path

_NOUNS = [
    "buffer",
    "rank",
    "shard",
    "bucket",
    "tensor",
    "layer",
    "step",
    "scale",
    "mask",
    "token",
    "window",
    "group",
    "node",
    "slot",
]
_VERBS = [
    "gather",
    "reduce",
    "scatter",
    "cast",
    "clip",
    "pack",
    "align",
    "record",
    "shift",
    "merge",
    "split",
    "load",
]


def _pick(source: random.Random, words: list[str]) -> str:
    return words[int(source.random() * len(words))]


def _function(source: random.Random) -> str:
    verb, noun, other = _pick(source, _VERBS), _pick(source, _NOUNS), _pick(source, _NOUNS)
    number = int(source.random() * 64)
    lines = [
        f"def {verb}_{noun}({noun}, {other}={number}):",
        f'    """{verb.capitalize()} the {noun} by its {other}."""',
    ]
    for _ in range(1 + int(source.random() * 4)):
        a, b, action = _pick(source, _NOUNS), _pick(source, _NOUNS), _pick(source, _VERBS)
        if source.random() < 0.5:
            lines.append(f"    {a} = {action}({b}, {noun}) + {int(source.random() * 10)}")
        else:
            lines += [f"    if {a} > {b}:", f"        {noun}.{action}({a})"]
    return "\n".join([*lines, f"    return {noun}", ""])


def write_corpus(folder: Path, functions: int = 2500) -> Path:
    """Write `corpus.txt` (about half a megabyte) and return its path."""
    source = random.Random(20)
    path = folder / "corpus.txt"
    path.write_text("\n".join(_function(source) for _ in range(functions)), encoding="utf-8")
    return path
