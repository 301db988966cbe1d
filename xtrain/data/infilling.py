"""GLM samples: spans cut from a text, to be predicted autoregressively in shuffled order.

Source: Du et al., "GLM: General Language Model Pretraining with Autoregressive Blank Infilling" (ACL
2022), figure 2 and section 2.1; the mixture of [MASK] and [gMASK] is GLM-130B's (ICLR 2023, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtrain.base.errors import DataError
from xtrain.data.random import CounterRandom
from xtrain.data.tokens import END, GMASK, MASK, START, TokenFile
from xtrain.models.glm import IGNORE_INDEX

IntArray = NDArray[np.int64]


class Sample(NamedTuple):
    """One training sample; all arrays are int64 of the same length.

    `input_ids`, `labels`: (length,); `position_ids`: (2, length); `context_length`: tokens of part A.
    """

    input_ids: IntArray
    labels: IntArray
    position_ids: IntArray
    context_length: int


def infill(
    tokens: Sequence[int],
    spans: Sequence[tuple[int, int]],
    order: Sequence[int],
    mask: int,
    start: int,
    end: int,
) -> Sample:
    """Corrupt `tokens`: part A has one `mask` for each span, part B the spans, in the given order.

    Args:
        tokens: the text.
        spans: disjoint [first, last) ranges, ascending.
        order: permutation of the spans' numbers, the order in part B.
        mask, start, end: ids of [MASK] or [gMASK], [S] and [E].
    """
    part_a: list[int] = []
    mask_position: list[int] = []
    done = 0
    for first, last in spans:
        part_a += [*tokens[done:first], mask]
        mask_position.append(len(part_a))  # positions count from 1
        done = last
    part_a += tokens[done:]
    ids, labels = list(part_a), [IGNORE_INDEX] * len(part_a)
    position1, position2 = list(range(1, len(part_a) + 1)), [0] * len(part_a)
    for number in order:
        first, last = spans[number]
        span = list(tokens[first:last])
        ids += [start, *span]
        labels += [*span, end]
        position1 += [mask_position[number]] * (len(span) + 1)
        position2 += range(1, len(span) + 2)
    return Sample(
        np.array(ids, dtype=np.int64),
        np.array(labels, dtype=np.int64),
        np.array([position1, position2], dtype=np.int64),
        len(part_a),
    )


@dataclass(frozen=True)
class InfillingSampler:
    """Draws GLM samples from a token file; sample i of step s depends on (seed, s, i) alone.

    Attributes:
        corpus: the tokens.
        length: tokens of a sample, parts A and B together.
        seed: of the whole run.
        gmask_share: share of samples that hide one long suffix behind [gMASK]; the others hide short
            spans behind [MASK].
        mask_share: share of a text that short spans hide.
        span_mean: mean length of short spans (Poisson).
    """

    corpus: TokenFile
    length: int
    seed: int
    gmask_share: float = 0.7
    mask_share: float = 0.15
    span_mean: float = 3.0

    def __post_init__(self) -> None:
        if self.length < 16:
            raise DataError(f"a sample of {self.length} tokens is too short: use at least 16")
        if len(self.corpus.tokens) < self.length:
            raise DataError(
                f"the corpus has {len(self.corpus.tokens)} tokens, fewer than one sample of {self.length}: add text"
            )

    def _text(self, random: CounterRandom, length: int) -> list[int]:
        first = random.integer(len(self.corpus.tokens) - length + 1)
        return self.corpus.tokens[first : first + length].tolist()

    def _suffix_sample(self, random: CounterRandom) -> Sample:
        length = self.length - 2  # [gMASK] and [S] are added
        text = self._text(random, length)
        first = 1 + random.integer(length - 1)
        ids = self.corpus.special
        return infill(text, [(first, length)], [0], ids[GMASK], ids[START], ids[END])

    def _spans_sample(self, random: CounterRandom) -> Sample:
        lengths: list[int] = []
        while sum(lengths) < self.mask_share * (self.length - 2 * len(lengths)):
            lengths.append(max(1, min(random.poisson(self.span_mean), self.length // 8)))
        length = self.length - 2 * len(lengths)  # each span adds a mask and an [S]
        text = self._text(random, length)
        # Spans keep at least one token between them: draw the gaps, then lay spans and gaps in a row.
        free = length - sum(lengths) - (len(lengths) - 1)
        offsets = sorted(random.integer(free + 1) for _ in lengths)
        spans, hidden = [], 0
        for number, (offset, span) in enumerate(zip(offsets, lengths, strict=True)):
            first = offset + number + hidden
            spans.append((first, first + span))
            hidden += span
        order = list(range(len(spans)))
        random.shuffle(order)
        ids = self.corpus.special
        return infill(text, spans, order, ids[MASK], ids[START], ids[END])

    def sample(self, step: int, index: int) -> Sample:
        """Sample `index` of the global batch of `step`."""
        random = CounterRandom(self.seed, step, index)
        make = self._suffix_sample if random.uniform() < self.gmask_share else self._spans_sample
        return make(random)

    def batch(self, step: int, slot: int, size: int) -> dict[str, IntArray]:
        """The micro-batch of a slot (data-parallel rank x accumulation steps + accumulation index).

        Returns:
            The arguments of `GLM.forward` as arrays: input_ids and labels (size, length), position_ids
            (size, 2, length), context_lengths (size,).
        """
        samples = [self.sample(step, slot * size + index) for index in range(size)]
        return {
            "input_ids": np.stack([sample.input_ids for sample in samples]),
            "labels": np.stack([sample.labels for sample in samples]),
            "position_ids": np.stack([sample.position_ids for sample in samples]),
            "context_lengths": np.array([sample.context_length for sample in samples], dtype=np.int64),
        }
