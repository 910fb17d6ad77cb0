"""Micro-batches: what the model reads, for any range of samples, as a pure function of that range.

    samples [first, first + B) --Order--> places --gather_pieces--> tokens [B, S + 1] --assemble--> MicroBatch

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
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import xxhash

from megalm._indexed_dataset import BatchMemory
from megalm._indexed_dataset import assemble as native_assemble
from megalm.data.dataset import Source, gather_pieces
from megalm.data.order import Blend, Order, Samples
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


class Loader:
    """The blend of `sources` by `weights`, in the order that `seed` gives, `validation_samples` of each held out.

    `stream` keeps up to `prefetch` global batches ready. Raises a `UserError` where a source is too small, a weight
    cannot be blended or two sources have one name.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        sequence_length: int,
        seed: int,
        eod: int,
        document_attention: bool,
        validation_samples: int,
        prefetch: int = 2,
    ) -> None:
        self.source_names = [source.name for source in sources]
        for name in self.source_names:
            if self.source_names.count(name) > 1:
                raise UserError(f"data.sources: {name!r} is the name of more than one source: name each differently")
        if len(weights) != len(sources):
            raise ValueError("each source has a weight")
        self._sources = list(sources)
        self._splits = [source.split(sequence_length, validation_samples) for source in sources]
        self._length, self._eod, self._document_attention = sequence_length, eod, document_attention
        self._prefetch = prefetch
        self._memory = BatchMemory()
        blend = Blend(weights)
        self._order = Order(
            names=self.source_names,
            windows=[split.training for split in self._splits],
            slack=[split.slack for split in self._splits],
            blend=blend,
            sequence_length=sequence_length,
            seed=seed,
        )
        decisive = {
            "order": 1,  # to be raised when the same settings give another order
            "sources": [[source.name, source.manifest.fingerprint] for source in sources],
            "shares": blend.counts,
            "sequence_length": sequence_length,
            "validation_samples": validation_samples,
            "seed": seed,
        }
        self.source_fingerprints = {source.name: source.manifest.fingerprint for source in sources}
        text = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
        self.fingerprint: str = xxhash.xxh3_128_hexdigest(text.encode())

    def micro_batch(self, first: int, count: int) -> MicroBatch:
        """Training samples [first, first + count): the same whenever and in whatever portions they are asked for."""
        return self._gather(self._order.locate(first, count))

    def stream(self, start: int, sizes: Iterable[Sequence[int]]) -> Generator[list[MicroBatch], None, None]:
        """Global batches from sample `start` on: one for each item of `sizes`, which lists its micro-batches' sizes.

        A thread prepares them ahead; an error there is raised here, at the batch that it is about. Closing the
        iterator, or dropping it, ends the thread.
        """
        pending: deque[Future[list[MicroBatch]]] = deque()
        thread = ThreadPoolExecutor(1, "megalm-data")
        try:
            for step in sizes:
                pending.append(thread.submit(self._global_batch, start, tuple(step)))
                start += sum(step)
                if len(pending) > self._prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            thread.shutdown(wait=True, cancel_futures=True)

    def validation(self, micro_size: int) -> list[tuple[str, list[MicroBatch]]]:
        """Each source's name and its held-out samples in the order of the text, `micro_size` at a time."""
        return [(source.name, list(self._held_out(number, micro_size))) for number, source in enumerate(self._sources)]

    def _held_out(self, number: int, micro_size: int) -> Iterator[MicroBatch]:
        split = self._splits[number]
        first, count = split.held_out_start, split.held_out
        settings = (self._length, micro_size, self._eod, self._document_attention)
        return windows(self._sources[number], number, first, count, *settings)

    def _global_batch(self, first: int, sizes: Sequence[int]) -> list[MicroBatch]:
        samples = self._order.locate(first, sum(sizes))
        ends = np.cumsum(sizes)[:-1]
        portions = zip(np.split(samples.source_B, ends), np.split(samples.start_B, ends), strict=True)
        return [self._gather(Samples(source_B, start_B)) for source_B, start_B in portions]

    def _gather(self, samples: Samples) -> MicroBatch:
        tokens_BS1 = self._memory.empty((len(samples.source_B), self._length + 1))
        length_B = np.full(len(tokens_BS1), self._length + 1)
        out = tokens_BS1.reshape(-1)
        gather_pieces(self._sources, samples.source_B, samples.start_B, length_B, self._eod, out)
        return assemble(tokens_BS1, samples.source_B, self._eod, self._document_attention, self._memory)
