"""Fill-in-the-middle: a document's part in a sample is cut in three, and the model learns to write the middle last.

    document     a b c d e f g h          cut at two places drawn at random
    PSM          <P> a b <S> f <M> c d e          prefix, suffix, middle
    SPM          <P> <S> f <M> a b c d e          suffix first, then prefix and middle as one

The sample keeps its length: the end of the suffix gives way to the three marks, as in Megatron's fim_dataset; where it
is no longer than they are, the document stays as it is. Cuts are between tokens. All draws are a function of the seed,
the source and the sample's rank in it, so they do not depend on batches, ranks or workers.

Sources: Bavarian et al., "Efficient training of language models to fill in the middle" (arXiv 2207.14255). Shape
suffixes: B samples, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalm.data.order.permutation import GOLDEN, derive_key, mix

MARKS = 3
DRAWS = 4  # for each document: whether, which form, two cuts


@dataclass(frozen=True)
class FillInTheMiddle:
    """`rate` of the documents are permuted, `spm_rate` of these in the form SPM; the marks are token ids."""

    rate: float
    spm_rate: float
    prefix: int
    middle: int
    suffix: int

    def apply(
        self,
        tokens_BS1: np.ndarray,
        source_B: np.ndarray,
        rank_B: np.ndarray,
        names: Sequence[str],
        seed: int,
        eod: int,
    ) -> None:
        """Permutes documents of samples, int64[B, S + 1], in place. They are told apart by their `eod` tokens."""
        for row, source, rank in zip(tokens_BS1, source_B.tolist(), rank_B.tolist(), strict=True):
            ends = np.append(np.flatnonzero(row == eod), len(row))
            starts = np.concatenate([[0], ends[:-1] + 1])
            key = derive_key("fill in the middle", seed, names[source], rank)
            steps = np.arange(1, DRAWS * len(ends) + 1, dtype=np.uint64) * np.uint64(GOLDEN)
            draws = mix(np.uint64(key) + steps).reshape(-1, DRAWS)
            for start, end, numbers in zip(starts.tolist(), ends.tolist(), draws.tolist(), strict=True):
                self._permute(row[start:end], numbers)

    def _permute(self, document: np.ndarray, draws: list[int]) -> None:
        """Permutes one document in place, if the first of four 64-bit draws says so and it is long enough."""
        if draws[0] >= self.rate * 2**64:
            return
        first, second = sorted(draw % (len(document) + 1) for draw in draws[2:])
        if len(document) - second <= MARKS:
            return
        prefix, middle, suffix = document[:first], document[first:second], document[second : len(document) - MARKS]
        if draws[1] < self.spm_rate * 2**64:
            document[:] = [self.prefix, self.suffix, *suffix, self.middle, *prefix, *middle]
        else:
            document[:] = [self.prefix, *prefix, self.suffix, *suffix, self.middle, *middle]
