"""Writes xtrain/migrate/surface.py from the record of DeepSpeed's names: `python -m tests.migrate.surface`."""

from __future__ import annotations

import textwrap

from tests.deepspeed_api import probe
from xtrain.base.files import write_text
from xtrain.migrate import resolve

TARGET = resolve.ROOT / "migrate" / "surface.py"

_HEAD = '''"""Names of DeepSpeedEngine's own attributes in DeepSpeed {version}: other ones are the model's.

Written by `python -m tests.migrate.surface`; a test compares the two.
"""

from __future__ import annotations

_ENGINE = """
{names}
"""
ENGINE = frozenset(_ENGINE.split())
'''


def document() -> str:
    """The module's text."""
    recorded = probe.read_record()
    names = textwrap.fill(" ".join(sorted(recorded["objects"]["engine"])), 110, break_long_words=False)
    return _HEAD.format(version=recorded["version"], names=names)


if __name__ == "__main__":
    write_text(TARGET, document())
