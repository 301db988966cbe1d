"""Logs of Megatron-LM and its relatives: lines such as

`iteration 10/ 100 | consumed samples: 320 | learning rate: 1.5E-04 | lm loss: 9.1E+00 | grad norm: 2.1 |`
"""

from __future__ import annotations

import re
from pathlib import Path

from xtrain.align.record import Record
from xtrain.align.sources.common import CurveBuilder, number

LINE = re.compile(r"\biteration\s*[:=]?\s*(\d+)\s*/\s*\d+\s*\|(.*)")
_CELL = re.compile(r"\s*([A-Za-z][^:|]*?)\s*:\s*([^|]*?)\s*(?:\||$)")
_SKIPPED = "number of skipped iterations"


def read_log(path: Path, text: str, loss: str | None) -> Record:
    """The iterations of a log; other lines are passed over.

    A line reports the mean loss since the line before it (Megatron's `--log-interval`), without the iterations that
    were skipped; gradient norm and learning rate are those of its iteration.
    """
    builder = CurveBuilder(path, "Megatron log", "iteration")
    builder.windowed = True
    last: int | None = None
    for line in text.splitlines():
        match = LINE.search(line)
        if match is None:
            continue
        cells = {name.strip(): value for name, value in _CELL.findall(match[2])}
        if number(cells.pop(_SKIPPED, None)):
            # Its loss is of fewer steps, or of none.
            cells = {name: value for name, value in cells.items() if "loss" not in name or "scale" in name}
        step = int(match[1])
        builder.add(step, cells, last if last is not None and last < step else None)
        last = step
    return builder.build(loss)
