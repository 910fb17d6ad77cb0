"""Micro-batches: what the model reads, for any range of samples, as a pure function of that range.

    samples [first, first + B) --Order--> pieces --gather_pieces--> tokens [B, S + 1] --assemble--> MicroBatch

The loader's state is one integer, the samples consumed so far; its `fingerprint` names all else that decides the order,
so a run that goes on with other data can be refused.

With `document_attention`, a document reaches to its end-of-document (eod) token, which belongs to it:

    tokens      a  b  eod  c  d | e  eod  eod  f  g        two sequences, S = 5
    labels      b eod  c   d  e | eod eod  f   g  h
    loss_mask   1  1   0   1  1 | 1   0   0   1  1         what follows an eod is not its document's to predict
    positions   0  1   2   0  1 | 0   1   0   0  1
    segments    0, 3, 5, 7, 8, 10                          attention stays inside of [segments[i], segments[i + 1])

Shape suffixes: B samples, S tokens of a sequence, T = B * S.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import xxhash

from megalm._indexed_dataset import BatchMemory
from megalm._indexed_dataset import assemble as native_assemble
from megalm.data.dataset import Source, gather_pieces
from megalm.data.fim import FillInTheMiddle
from megalm.data.order import OrderOptions, Stage, build_order
from megalm.errors import UserError


@dataclass(frozen=True)
class MicroBatch:
    """B sequences of S tokens, one after the other."""

    tokens_T: np.ndarray
    """int64."""
    labels_T: np.ndarray
    """int64: the token after each token."""
    loss_mask_T: np.ndarray
    """bool: false where the label belongs to another document than the token."""
    positions_T: np.ndarray
    """int64, from 0 in each segment."""
    segments: np.ndarray
    """int32: 0, then the ends of the segments; the last is T. A segment is a document's part in one sequence, or with
    no document attention the sequence."""
    sources_B: np.ndarray
    """int64: each sequence's source."""
    sequence_length: int


def assemble(
    tokens_BS1: np.ndarray,
    sources_B: np.ndarray,
    eod: int,
    document_attention: bool,
    memory: BatchMemory | None = None,
) -> MicroBatch:
    """The micro-batch of B sequences of S tokens and one more, int64[B, S + 1]; its arrays are taken from `memory`."""
    arrays = native_assemble(tokens_BS1, eod if document_attention else None, memory or BatchMemory())
    return MicroBatch(*arrays, sources_B=sources_B, sequence_length=tokens_BS1.shape[1] - 1)


def windows(
    source: Source,
    number: int,
    first: int,
    count: int,
    length: int,
    micro_size: int,
    eod: int,
    document_attention: bool,
) -> Iterator[MicroBatch]:
    """`count` sequences of `length` tokens, back to back from token `first` of a source; `number` goes to sources_B."""
    memory = BatchMemory()
    for done in range(0, count, micro_size):
        sequences = min(micro_size, count - done)
        tokens_BS1 = memory.empty((sequences, length + 1))
        start_B = first + (done + np.arange(sequences)) * length
        same_B = np.zeros(sequences, np.int64)
        gather_pieces([source], same_B, start_B, same_B + length + 1, eod, tokens_BS1.reshape(-1))
        yield assemble(tokens_BS1, same_B + number, eod, document_attention, memory)


def shared_windows(
    source: Source,
    number: int,
    first: int,
    count: int,
    length: int,
    micro_size: int,
    eod: int,
    document_attention: bool,
    rank: int,
    ranks: int,
) -> Iterator[MicroBatch]:
    """The r-th of `ranks` shares of `windows`. All have as many micro-batches; where sequences run out, some hold one
    that does not count."""
    share = -(-count // ranks)
    begin = min(rank * share, count)
    mine = min(share, count - begin)
    settings = (length, micro_size, eod, document_attention)
    yield from windows(source, number, first + begin * length, mine, *settings)
    for _ in range(-(-mine // micro_size), -(-share // micro_size)):
        [one] = windows(source, number, first, 1, *settings)
        yield replace(one, loss_mask_T=np.zeros_like(one.loss_mask_T))


class GlobalBatch(NamedTuple):
    """One step's samples: what this rank reads of them, and what identifies all of them."""

    parts: list[MicroBatch]
    """This rank's micro-batches."""
    source_B: np.ndarray
    """int64: source of each sample of all ranks, in the global order."""
    rank_B: np.ndarray
    """int64: how many samples of its source come before it in the run."""


class Loader:
    """The blend of `sources` by `weights`, or in stages, in the order that `seed` and `options` give, but for
    `validation_samples` of each source, which are held out.

    `stream` keeps up to `prefetch` global batches ready, which `workers` threads prepare. Raises a `UserError` where a
    source is too small, a weight cannot be blended or two sources have one name.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | Sequence[Stage],
        sequence_length: int,
        seed: int,
        eod: int,
        document_attention: bool,
        validation_samples: int,
        prefetch: int = 2,
        *,
        options: OrderOptions | None = None,
        fim: FillInTheMiddle | None = None,
        workers: int = 1,
    ) -> None:
        self.source_names = [source.name for source in sources]
        for name in self.source_names:
            if self.source_names.count(name) > 1:
                raise UserError(f"data.sources: {name!r} is the name of more than one source: name each differently")
        if len(weights) != len(sources) and not any(isinstance(part, Stage) for part in weights):
            raise ValueError("each source has a weight")
        self._sources = list(sources)
        self._splits = [source.split(sequence_length, validation_samples) for source in sources]
        self._length, self._eod, self._document_attention = sequence_length, eod, document_attention
        self._seed, self._fim = seed, fim
        self._memory = BatchMemory()
        self._prefetch, self._workers = max(prefetch, workers if workers > 1 else 0), workers
        self.order = build_order(sources, self._splits, weights, sequence_length, seed, options or OrderOptions())
        decisive = {
            "version": 2,  # to be raised when the same settings give another order
            "sources": [[source.name, source.manifest.fingerprint] for source in sources],
            "order": self.order.describe(),
            "sequence_length": sequence_length,
            "validation_samples": validation_samples,
            "seed": seed,
            "fim": asdict(fim) if fim else None,
        }
        self.source_fingerprints = {source.name: source.manifest.fingerprint for source in sources}
        text = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
        self.fingerprint: str = xxhash.xxh3_128_hexdigest(text.encode())

    def micro_batch(self, first: int, count: int) -> MicroBatch:
        """Training samples [first, first + count): the same whenever and in whatever portions they are asked for."""
        return next(self._micro_batches(*self.order.locate(first, count), [count]))

    def stream(
        self,
        start: int,
        sizes: Iterable[Sequence[int]],
        rank: int = 0,
        ranks: int = 1,
        finish: Callable[[MicroBatch], MicroBatch] | None = None,
    ) -> Generator[GlobalBatch, None, None]:
        """Global batches from sample `start` on: one for each item of `sizes`, which lists the micro-batch sizes of
        each of `ranks` data ranks. Rank r reads the r-th of `ranks` equal shares of the samples, and no other.

        Threads prepare them ahead and apply `finish`, if given, to each micro-batch; an error there is raised here, at
        the batch that it is about. Closing the iterator, or dropping it, ends the threads.
        """
        pending: deque[Future[GlobalBatch]] = deque()
        threads = ThreadPoolExecutor(self._workers, "megalm-data")
        try:
            for step in sizes:
                pending.append(threads.submit(self._global_batch, start, tuple(step), rank, ranks, finish))
                start += sum(step) * ranks
                if len(pending) > self._prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)

    def validation(self, micro_size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[str, Iterator[MicroBatch]]]:
        """Each source's name and its held-out samples in the order of the text, `micro_size` at a time: the r-th of
        `ranks` shares, as `shared_windows` has them."""
        settings = (self._length, micro_size, self._eod, self._document_attention, rank, ranks)
        for number, (source, split) in enumerate(zip(self._sources, self._splits, strict=True)):
            yield source.name, shared_windows(source, number, split.held_out_start, split.held_out, *settings)

    def _global_batch(
        self, first: int, sizes: Sequence[int], rank: int, ranks: int, finish: Callable[[MicroBatch], MicroBatch] | None
    ) -> GlobalBatch:
        source_B, rank_B = self.order.locate(first, sum(sizes) * ranks)
        share = slice(rank * sum(sizes), (rank + 1) * sum(sizes))
        parts = self._micro_batches(source_B[share], rank_B[share], sizes)
        return GlobalBatch([finish(part) if finish else part for part in parts], source_B, rank_B)

    def _micro_batches(self, source_B: np.ndarray, rank_B: np.ndarray, sizes: Sequence[int]) -> Iterator[MicroBatch]:
        """Samples as micro-batches: their places found all at once, their tokens read a micro-batch at a time, which
        then lie in the processor's cache."""
        pieces = self.order.places.pieces(source_B, rank_B)
        samples = np.cumsum([0, *sizes])
        cuts = np.searchsorted(np.cumsum(pieces.length_P), samples * (self._length + 1), side="right")
        for (a, b), (first, end) in zip(pairwise(samples.tolist()), pairwise(cuts.tolist()), strict=True):
            tokens_BS1 = self._memory.empty((b - a, self._length + 1))
            source_P, start_P, length_P = (column[first:end] for column in pieces[1:])
            gather_pieces(self._sources, source_P, start_P, length_P, self._eod, tokens_BS1.reshape(-1))
            if self._fim is not None:
                self._fim.apply(tokens_BS1, source_B[a:b], rank_B[a:b], self.source_names, self._seed, self._eod)
            yield assemble(tokens_BS1, pieces.sample_B_source[a:b], self._eod, self._document_attention, self._memory)
