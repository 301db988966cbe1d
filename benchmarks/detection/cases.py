"""All runs of the tables by title."""

from __future__ import annotations

from benchmarks.detection.case import Case
from benchmarks.detection.defects import DEFECTS
from benchmarks.detection.harmless import HARMLESS, REFERENCES

CASES = (*REFERENCES, *DEFECTS, *HARMLESS)


def find(title: str) -> Case:
    """The case with this title."""
    return next(case for case in CASES if case.title == title)
