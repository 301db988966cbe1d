"""How the launcher starts modules of its own in a new process."""

from __future__ import annotations

import sys


def python_module(module: str, *arguments: str) -> list[str]:
    """`python -m MODULE`; without the current folder on the path, where a `random.py` would hide Python's own.

    Python 3.10 cannot leave it out.
    """
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    return [sys.executable, *safe, "-m", module, *arguments]
