"""Order mode `stateless`: a keyed permutation of each source's windows for each epoch. Nothing is built or stored.

    rank   --divmod by the source's windows-->                     epoch, place in the epoch
    place  --Permutation keyed by (seed, source, epoch)-->         window
    window --times the sequence length, plus the epoch's phase-->  first token

The windows lie back to back from a phase in [0, slack] that changes with the epoch, so that documents are not cut at
the same places again. All follows from the seed, the sources' names and sizes and the sequence length.

Shape suffix: B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalm.data.order.permutation import Permutation, derive_key
from megalm.data.order.pieces import Pieces


@dataclass(frozen=True)
class Stateless:
    """Sample = tokens [start, start + sequence_length + 1) of a source; each window is drawn once in each epoch."""

    names: Sequence[str]
    windows: Sequence[int]
    slack: Sequence[int]
    sequence_length: int
    seed: int

    @property
    def epoch_samples(self) -> np.ndarray:
        """Windows of each source: int64[N]."""
        return np.asarray(self.windows, np.int64)

    def pieces(self, source_B: np.ndarray, rank_B: np.ndarray) -> Pieces:
        """One piece a sample."""
        windows_B = self.epoch_samples[source_B]
        epoch_B, place_B = np.divmod(rank_B, windows_B)
        pairs, pair_B = np.unique(epoch_B * len(self.names) + source_B, return_inverse=True)
        epochs = [divmod(pair, len(self.names)) for pair in pairs.tolist()]
        keys = np.array([derive_key("window", self.seed, self.names[s], epoch) for epoch, s in epochs], np.uint64)
        phases = np.array(
            [derive_key("phase", self.seed, self.names[s], epoch) % (self.slack[s] + 1) for epoch, s in epochs],
            np.int64,
        )
        window_B = Permutation(windows_B, keys[pair_B])(place_B)
        start_B = window_B * self.sequence_length + phases[pair_B]
        return Pieces(source_B, source_B, start_B, np.full(len(source_B), self.sequence_length + 1))

    def describe(self) -> object:
        """Its name."""
        return "stateless"
