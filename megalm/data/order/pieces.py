"""Where the tokens of samples lie: what every order mode gives, and what is gathered.

    sample 0     | piece of document 4 | piece of document 9           |
    sample 1     | piece of document 2 | piece of document 7 | padding |      each sample: S + 1 tokens

Shape suffixes: B samples, P pieces.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

PADDING = -1


class Pieces(NamedTuple):
    """B samples as P pieces of text, in contiguous arrays. The pieces of a sample are adjacent; their lengths sum to
    S + 1."""

    sample_B_source: np.ndarray
    """int64[B]: the source that each sample counts for."""
    source_P: np.ndarray
    """int64[P]: number of the source, or PADDING: then the piece is `length` end-of-document tokens."""
    start_P: np.ndarray
    """int64[P]: first token, counted over the source's shards one after the other; 0 in padding."""
    length_P: np.ndarray
    """int64[P]: tokens."""


class Places(Protocol):
    """An order mode: where in the sources' text the samples lie that a mixture draws."""

    @property
    def epoch_samples(self) -> np.ndarray:
        """Samples in an epoch of each source: int64[N]."""
        ...

    def pieces(self, source_B: np.ndarray, rank_B: np.ndarray) -> Pieces:
        """The pieces of the samples that are the `rank_B`-th, from 0, of the sources `source_B`; both int64[B]."""
        ...

    def describe(self) -> object:
        """All that decides it but the sources, the seed and the sequence length, as plain JSON values."""
        ...
