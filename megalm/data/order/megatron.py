"""Order mode `megatron`: the samples of Megatron-LM's GPTDataset and BlendedDataset, for runs that come from there.

    document index   all training documents, as often as there are epochs, shuffled by numpy's RandomState(seed)
    sample k         tokens [k * S, (k + 1) * S] of these documents, one after the other
    shuffle index    a permutation of the samples
    blend            each sample from the source that is farthest behind its weight

Where the last epoch is used for less than 80 %, it is shuffled for itself, its documents and its samples. All this is
built when training starts, as Megatron builds it, and held in memory: 12 bytes for each document and epoch, 8 for each
document, 4 for each sample of a source and 10 for each of the blend. It depends on the length of the run, too.

What is taken over: `--data-path` with weights (without, if there is one source), `--split` by documents of which the
first part is trained on, `--seed`, `--seq-length`, and as samples all that the run takes (`--train-iters` times
`--global-batch-size`, or `--train-samples`). A document is a sequence of the .idx, as it is there.

Source: megatron-core 0.16.1, megatron/core/datasets: gpt_dataset.py, blended_megatron_dataset_builder.py, helpers.cpp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from megalm._order import blend
from megalm.data.dataset import Source
from megalm.data.order.pieces import Pieces
from megalm.errors import UserError

SURPLUS = 0.005  # samples that are built beyond what a source's weight asks for
SEPARATE_BELOW = 0.80  # share of the last epoch below which it is shuffled for itself


def training_documents(split: str, documents: int) -> int:
    """How many documents, from the first on, a `--split` such as "969,30,1" trains on."""
    shares = np.array([float(share) for share in re.findall(r"[.0-9]+", split)])
    return round(float((shares / np.sum(shares))[0]) * float(documents))


class SourceIndex:
    """The samples of one source: `num_samples` at least, from as many whole epochs as that takes.

    `lengths` (int32) are the tokens of all sequences, the first `documents` of which are trained on.
    """

    def __init__(self, lengths: np.ndarray, documents: int, num_samples: int, sequence_length: int, seed: int) -> None:
        self.tokens = int(lengths[:documents].sum(dtype=np.int64))
        self.epoch_samples = (self.tokens - 1) // sequence_length
        self.epochs = max(1, -(-(num_samples * sequence_length + 1) // self.tokens))
        self._length = sequence_length
        before_last = ((self.epochs - 1) * self.tokens - 1) // sequence_length
        from_last = num_samples - before_last
        separate = self.epochs > 1 and from_last < int(SEPARATE_BELOW * self.epoch_samples)
        random = np.random.RandomState(seed)  # each shuffle goes on where the one before left it
        self.document_index = np.concatenate(
            [_shuffled_documents(documents, n, random) for n in ([self.epochs - 1, 1] if separate else [self.epochs])]
        )
        self.samples = (self.epochs * self.tokens - 1) // sequence_length
        cuts = [0, before_last, self.samples] if separate else [0, self.samples]
        kind = np.int64 if self.samples >= 2**32 - 2 else np.uint32
        self.shuffle_index = np.concatenate([_shuffled_range(a, b, kind, random) for a, b in pairwise(cuts)])
        self._starts = np.cumsum(lengths[:documents], dtype=np.int64) - lengths[:documents]
        self._ends = np.cumsum(lengths[self.document_index], dtype=np.int64)

    def pieces(self, rank: int) -> list[tuple[int, int]]:
        """First token in the source, and length, of the pieces of the shuffled sample `rank`."""
        first = int(self.shuffle_index[rank]) * self._length
        last = int(np.searchsorted(self._ends, first + self._length, side="right"))
        position = np.arange(int(np.searchsorted(self._ends, first, side="right")), last + 1)
        begin = self._begin(position)
        skip = np.maximum(first - begin, 0)
        end = np.minimum(first + self._length + 1, self._ends[position])
        length = end - (begin + skip)
        start = self._starts[self.document_index[position]] + skip
        return [(a, n) for a, n in zip(start.tolist(), length.tolist(), strict=True) if n]

    def _begin(self, position: np.ndarray) -> np.ndarray:
        """First token of the documents at these positions, counted over the document index."""
        return np.where(position > 0, self._ends[position - 1], 0)


def _shuffled_documents(documents: int, epochs: int, random: np.random.RandomState) -> np.ndarray:
    index = np.tile(np.arange(documents, dtype=np.int32), epochs)
    random.shuffle(index)
    return index


def _shuffled_range(start: int, end: int, kind: type, random: np.random.RandomState) -> np.ndarray:
    index: np.ndarray = np.arange(start, end, dtype=kind)
    random.shuffle(index)
    return index


class MegatronBlend:
    """The first `samples` of a blend by `weights`; a single source is not blended."""

    def __init__(self, weights: Sequence[float], samples: int) -> None:
        normalised = np.array(weights, np.float64)
        normalised = normalised / np.sum(normalised)
        self._samples = samples
        self._sources = len(weights)
        asked = [math.ceil(samples * weight) for weight in normalised.tolist()]
        self.wanted = [math.ceil(n * (1 + SURPLUS)) for n in asked] if len(weights) > 1 else [samples]
        self.source, self.rank = np.zeros(0, np.int16), np.zeros(0, np.int64)
        if len(weights) > 1:
            self.source, self.rank = blend(normalised, sum(asked))

    def locate(self, index: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sample and its rank within that source; IndexError past the run's last."""
        indices = np.asarray(index, np.int64)
        if (indices >= self._samples).any():
            raise IndexError(f"the order was built for {self._samples} samples")
        if self._sources == 1:
            return np.zeros_like(indices), indices
        return self.source[indices].astype(np.int64), self.rank[indices]

    def drawn(self, samples: int) -> np.ndarray:
        """How many of the first `samples` are from each source: int64[N]."""
        if self._sources == 1:
            return np.array([samples])
        return np.bincount(self.source[:samples], minlength=self._sources)

    def describe(self) -> object:
        """What it was built for."""
        return [self._samples, self.wanted]


class Megatron:
    """The samples of all sources, `wanted[s]` at least of source s, from the part of each that `split` trains on."""

    def __init__(
        self, sources: Sequence[Source], wanted: Sequence[int], split: str, sequence_length: int, seed: int
    ) -> None:
        self._split = split
        self.indices: list[SourceIndex] = []
        for source, samples in zip(sources, wanted, strict=True):
            lengths = source.sequence_lengths()
            documents = training_documents(split, len(lengths))
            if int(lengths[:documents].sum(dtype=np.int64)) < sequence_length + 1:
                raise UserError(
                    f"data.split={split!r} trains on {documents} of the {len(lengths)} documents of source "
                    f"{source.name!r}, which make no sample of data.sequence_length={sequence_length}: raise its first "
                    "number"
                )
            self.indices.append(SourceIndex(lengths, documents, samples, sequence_length, seed))
        self.epoch_samples = np.array([index.epoch_samples for index in self.indices], np.int64)
        self.training_tokens = [index.tokens for index in self.indices]

    def pieces(self, source_B: np.ndarray, rank_B: np.ndarray) -> Pieces:
        """A piece for each document of each sample."""
        flat = [
            (source, start, length)
            for source, rank in zip(source_B.tolist(), rank_B.tolist(), strict=True)
            for start, length in self.indices[source].pieces(rank)
        ]
        source_P, start_P, length_P = np.ascontiguousarray(np.array(flat, np.int64).reshape(-1, 3).T)
        return Pieces(source_B, source_P, start_P, length_P)

    def describe(self) -> object:
        """Its name and the documents it trains on."""
        return ["megatron", self._split]
