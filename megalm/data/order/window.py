"""Order mode `window`: documents are shuffled, and packed whole where they can be, inside of windows of the text.

    epoch of a source    [ phase | window 0 | window 1 | ... | last window, shorter ]      in permuted order
    window               K * S tokens of the text  --best-fit packing-->  exactly K samples of S + 1 tokens
    sample               | document | document | padding |      or      | a stretch of a long document |

A window has as many samples as the sequence length S goes into its tokens, whatever its documents are like. So which
window a sample is in is arithmetic, as in mode `stateless`: nothing is read or summed up at the start, and the state is
one integer. A window is packed when its first sample is asked for, which needs two binary searches in the shards' .idx
and the window's own entries, and is kept until others push it out: 12 bytes for each piece, for about one window a
source.

K samples of S + 1 slots are enough for K * S tokens: a document is cut only to fill a sample, which costs that sample
one slot for the token that is repeated as the label, so no more than one slot a sample is lost while there is anything
left to place. Best-fit packing as in arXiv 2404.10830 cuts a document only if it is longer than a sample; here the few
are cut, too, that fit nowhere whole when the samples fill up, and at most 1 / (S + 1) of all slots is padding.
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

SPARE = 8  # packed windows that are kept beside one for each source, for batches that span two


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
        parts = []
        for source, epoch, window in _distinct(source_B, epoch_B, window_B):
            mine = np.flatnonzero((source_B == source) & (epoch_B == epoch) & (window_B == window))
            parts.append(self._samples(source, self._packed(source, epoch, window), inside_B[mine], mine))
        sample_P, *columns = np.concatenate(parts, axis=1) if parts else np.zeros((4, 0), np.int64)
        by_sample = np.argsort(sample_P, kind="stable")
        source_P, start_P, length_P = (column[by_sample] for column in columns)
        return Pieces(source_B, source_P, start_P, length_P)

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
            while len(self._cache) > len(self._names) + SPARE:
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

    def _samples(self, source: int, packed: _Window, inside: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """Sample, source, start and length of the pieces of a window's samples `inside`: int64[4, P].

        The last piece may lack its document's end, so padding goes before it: else the model would learn to end there.
        """
        begin = packed.first_piece[inside]
        count = packed.first_piece[inside + 1] - begin
        slots = count + 1  # each sample's pieces and its padding, which may be empty
        number = np.repeat(np.arange(len(inside)), slots)
        slot = np.arange(len(number)) - np.repeat(np.cumsum(slots) - slots, slots)
        place = np.maximum(count - 1, 0)[number]
        text = slot != place
        piece = (begin[number] + slot - (slot > place))[text]
        start, length = np.zeros(len(number), np.int64), np.zeros(len(number), np.int64)
        start[text], length[text] = packed.start_P[piece], packed.length_P[piece]
        length[~text] = self._length + 1 - np.bincount(number, length, minlength=len(inside)).astype(np.int64)
        rows = np.stack([sample[number], np.where(text, source, PADDING), start, length])
        return rows[:, length > 0]

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
