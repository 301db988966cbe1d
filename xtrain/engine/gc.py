"""`disable_python_gc`: no automatic garbage collection while an engine that asks for it exists.

Collections happen at different moments on different ranks, and each makes the others wait. Reference
counting goes on; `engine.collect_python_gc()` collects cycles when the script says.
"""

from __future__ import annotations

import gc
import os

_engines: set[int] = set()
_was_enabled = False


def hold(engine_id: int) -> None:
    """Switch automatic collection off for this engine."""
    global _was_enabled
    if not _engines:
        _was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()
    _engines.add(engine_id)


def release(engine_id: int) -> None:
    """The engine has ended; after the last one, collection is as it was before the first."""
    if engine_id not in _engines:
        return
    _engines.discard(engine_id)
    if not _engines and _was_enabled:
        gc.enable()


def _in_child() -> None:
    """A forked process (a loader's worker) has no engine."""
    for engine_id in list(_engines):
        release(engine_id)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
