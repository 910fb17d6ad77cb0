"""Order mode `window`: documents are shuffled, and packed whole where they can be, inside of windows of the text.

    epoch of a source    [ phase | window 0 | window 1 | ... | last window, shorter ]      in permuted order
    window               K * S tokens of the text  --best-fit packing-->  exactly K samples of S + 1 tokens
    sample               | document | document | padding |      or      | a stretch of a long document |

A window has as many samples as the sequence length S goes into its tokens, whatever its documents are like. So which
window a sample is in is arithmetic, as in mode `stateless`: nothing is read or summed up at the start, and the state is
one integer. A window is packed when its first sample is asked for and kept until others push it out. What that needs of
the shards' .idx is two binary searches and the window's own entries.

That K samples are enough is csrc/order's bound: a sample of S + 1 slots loses at most one of them, to padding or to the
token that a cut document repeats. Best-fit packing as in arXiv 2404.10830 cuts a document only if it is longer than a
sample; here the few are cut, too, that fit nowhere whole when the samples fill up, and padding is at most 1 / (S + 1).
A document that the window's end cuts loses the prediction across the cut. Documents are told apart in a sample by their
end-of-document tokens, which `megalm data prepare` writes.

Source: Ding et al., "Fewer truncations improve language modeling" (arXiv 2404.10830). Shape suffixes: B samples, P
pieces.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megalm._order import pack
from megalm.data.order.permutation import Permutation, derive_key
from megalm.data.order.pieces import PADDING, Pieces

KEPT_A_SOURCE = 2  # packed windows: the one that is read and, while a batch spans two, its neighbour


class Documents(Protocol):
    """A source that knows where its documents start."""

    def document_starts(self, first: int, end: int) -> np.ndarray:
        """The first tokens of all documents that start in [first, end): int64, rising."""
        ...


@dataclass(frozen=True)
class _Window:
    """A packed window's pieces, sorted by sample."""

    first_piece: np.ndarray
    """int64[samples + 1]."""
    start_P: np.ndarray
    """int64: first token in the source."""
    length_P: np.ndarray
    """int32."""


class Window:
    """Samples from windows of about `window_tokens` tokens; `tokens[s]` is what source s has for training."""

    def __init__(
        self,
        names: Sequence[str],
        sources: Sequence[Documents],
        tokens: Sequence[int],
        sequence_length: int,
        window_tokens: int,
        seed: int,
    ) -> None:
        self._names, self._sources, self._seed = list(names), list(sources), seed
        self._length = sequence_length
        self._size = max(1, window_tokens // sequence_length)  # samples in a window
        self.epoch_samples = np.asarray(tokens, np.int64) // sequence_length
        self._slack = np.asarray(tokens, np.int64) % sequence_length
        self._cache: OrderedDict[tuple[int, int, int], _Window] = OrderedDict()
        self._lock = threading.Lock()

    def describe(self) -> object:
        """Its name and the samples of a window."""
        return ["window", self._size]

    def pieces(self, source_B: np.ndarray, rank_B: np.ndarray) -> Pieces:
        """The pieces of each sample, the padding of a sample before its last piece."""
        epoch_B, place_B = np.divmod(rank_B, self.epoch_samples[source_B])
        window_B, inside_B = np.empty_like(rank_B), np.empty_like(rank_B)
        for source, epoch in _distinct(source_B, epoch_B):
            mine = (source_B == source) & (epoch_B == epoch)
            window_B[mine], inside_B[mine] = self._window_of(source, epoch, place_B[mine])
        samples: list[list[tuple[int, int, int]]] = [[]] * len(source_B)
        for source, epoch, window in _distinct(source_B, epoch_B, window_B):
            packed = self._packed(source, epoch, window)
            for b in np.flatnonzero((source_B == source) & (epoch_B == epoch) & (window_B == window)).tolist():
                samples[b] = self._sample(source, packed, int(inside_B[b]))
        flat = np.array([piece for sample in samples for piece in sample], np.int64).reshape(-1, 3)
        return Pieces(source_B, flat[:, 0], flat[:, 1], flat[:, 2])

    def _window_of(self, source: int, epoch: int, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The window that holds each place of an epoch, and the place in it.

        Whole windows come in permuted order; the shorter one at the end of the text is put among them at random.
        """
        whole, rest = divmod(int(self.epoch_samples[source]), self._size)
        if whole == 0:
            return np.zeros_like(place), place
        before = self._key("last window", source, epoch) % (whole + 1) * self._size if rest else 0
        in_rest = (place >= before) & (place < before + rest)
        shifted = np.where(place < before, place, place - rest)
        number = np.where(in_rest, 0, shifted // self._size)
        window = Permutation(whole, self._key("windows", source, epoch))(number)
        return np.where(in_rest, whole, window), np.where(in_rest, place - before, shifted % self._size)

    def _packed(self, source: int, epoch: int, window: int) -> _Window:
        with self._lock:
            if (packed := self._cache.get((source, epoch, window))) is not None:
                self._cache.move_to_end((source, epoch, window))
                return packed
        packed = self._pack(source, epoch, window)
        with self._lock:
            self._cache[source, epoch, window] = packed
            while len(self._cache) > KEPT_A_SOURCE * len(self._names):
                self._cache.popitem(last=False)
        return packed

    def _pack(self, source: int, epoch: int, window: int) -> _Window:
        samples = min(self._size, int(self.epoch_samples[source]) - window * self._size)
        phase = self._key("phase", source, epoch) % (int(self._slack[source]) + 1)
        first = phase + window * self._size * self._length
        end = first + samples * self._length
        starts = self._sources[source].document_starts(first, end + 1)
        open_end = not (len(starts) and starts[-1] == end)
        starts = np.union1d(starts[starts < end], [first])  # distinct: documents without tokens leave no trace
        lengths = np.diff(starts, append=end)
        closed = len(lengths) - open_end
        key = self._key("documents", source, epoch, window)
        order = np.arange(len(lengths))
        if closed:
            order[:closed] = Permutation(closed, key)(order[:closed])
        item, skip, length, first_piece = pack(lengths[order], samples, self._length + 1, open_end)
        return _shuffled(_Window(first_piece, starts[order][item] + skip, length.astype(np.int32)), key)

    def _sample(self, source: int, packed: _Window, number: int) -> list[tuple[int, int, int]]:
        """Source, start and length of a sample's pieces.

        The last piece may lack its document's end, so padding goes before it: else the model would learn to end there.
        """
        begin, end = packed.first_piece[number : number + 2].tolist()
        starts, lengths = packed.start_P[begin:end].tolist(), packed.length_P[begin:end].tolist()
        pieces = [(source, start, length) for start, length in zip(starts, lengths, strict=True)]
        if padding := self._length + 1 - sum(lengths):
            pieces.insert(max(0, len(pieces) - 1), (PADDING, 0, padding))
        return pieces

    def _key(self, purpose: str, source: int, epoch: int, window: int | None = None) -> int:
        name = self._names[source] if window is None else f"{self._names[source]}/{window}"
        return derive_key(purpose, self._seed, name, epoch)


def _shuffled(window: _Window, key: int) -> _Window:
    """The samples of a window in random order: packing puts the longest documents into the first."""
    counts = np.diff(window.first_piece)
    sample = Permutation(len(counts), key)(np.arange(len(counts)))
    first_piece = np.concatenate([[0], np.cumsum(counts[sample])])
    piece = np.repeat(window.first_piece[sample] - first_piece[:-1], counts[sample]) + np.arange(first_piece[-1])
    return _Window(first_piece, window.start_P[piece], window.length_P[piece])


def _distinct(*columns: np.ndarray) -> list[tuple[int, ...]]:
    """The distinct rows of int64[B] columns."""
    return [tuple(row) for row in np.unique(np.stack(columns, axis=1), axis=0).tolist()]
