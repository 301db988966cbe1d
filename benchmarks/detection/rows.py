"""Rows of packed documents out of the corpus, for the Llama of the held-out cases."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.detection.llama import IGNORE_INDEX
from xtrain.data.random import CounterRandom
from xtrain.data.tokens import TokenFile

SHORTEST, LONGEST = 8, 40
"""Tokens of a document."""

Arrays = dict[str, NDArray[np.int64]]


class Rows:
    """Sample i of step s depends on (seed, s, i) alone.

    Args:
        corpus: the tokens.
        length: tokens of a row.
        seed: of the run.
        samples: rows of a step.
    """

    def __init__(self, corpus: TokenFile, length: int, seed: int, samples: int) -> None:
        self.corpus, self.length, self.seed, self.samples = corpus, length, seed, samples
        self.row = lru_cache(maxsize=4 * samples)(self._row)

    def _row(self, step: int, index: int) -> Arrays:
        """One row: documents of random lengths, of whose beginning a random part is not predicted."""
        random = CounterRandom(self.seed, step, index)
        columns: dict[str, list[int]] = {"input_ids": [], "positions": [], "documents": [], "labels": []}
        number = 0
        while (left := self.length - len(columns["input_ids"])) > 0:
            size = min(SHORTEST + random.integer(LONGEST - SHORTEST), left)
            first = random.integer(len(self.corpus.tokens) - size)
            text = self.corpus.tokens[first : first + size + 1].tolist()
            prompt = random.integer(size // 2 + 1)
            columns["input_ids"] += text[:-1]
            columns["positions"] += range(size)
            columns["documents"] += [number] * size
            columns["labels"] += [IGNORE_INDEX] * prompt + text[1 + prompt :]
            number += 1
        return {name: np.array(values, dtype=np.int64) for name, values in columns.items()}

    def labelled(self, step: int) -> int:
        """Labelled tokens of all rows of a step."""
        rows = (self.row(step, index) for index in range(self.samples))
        return sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows)

    def batch(self, step: int, slot: int, size: int) -> dict[str, torch.Tensor]:
        """The micro-batch of a slot: each column (size, length)."""
        rows = [self.row(step, slot * size + index) for index in range(size)]
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
