"""A source: a prepared directory, opened as one stream of tokens, and how that stream is split.

    shard-00000 | shard-00001 | ...      one stream of T tokens, mapped, never read whole; a sample may span shards
    [ phase [ N training windows ] rest ][ V held-out windows ]

Neighbouring windows of L tokens share one token: the last label of one is the first input of the next, so each needs
L + 1. Held out are the last V windows; no training sample reads one of their tokens. Opening reads the manifest, the
index headers and the file sizes only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalm.data.indexed import open_shard
from megalm.data.manifest import Manifest
from megalm.errors import UserError


@dataclass(frozen=True)
class Split:
    """A source's tokens as windows of `length` tokens and one label."""

    length: int
    training: int
    """Training windows, in every epoch."""
    slack: int
    """Largest phase: training windows start at phase + window * length, phase from 0 to this."""
    held_out: int
    """Held-out windows."""
    held_out_start: int
    """First token that is held out; held-out window v starts at this + v * length."""

    @property
    def training_tokens(self) -> int:
        """Tokens that are not held out: the first ones."""
        return self.held_out_start


class Source:
    """A prepared directory as one token stream; `tokens` is its length.

    Raises a `UserError` where files are missing or disagree in size with each other or with the manifest, or where
    another tokenizer than the run's, whose fingerprint is given, has made them.
    """

    def __init__(self, name: str, directory: str | Path, tokenizer_fingerprint: str) -> None:
        self.name = name
        self.directory = Path(directory)
        self.manifest = Manifest.load(self.directory)
        tokenizer = self.manifest.tokenizer
        if tokenizer.fingerprint != tokenizer_fingerprint:
            raise UserError(
                f"{self.directory}: prepared with tokenizer {tokenizer.path!r} ({tokenizer.kind}, "
                f"{tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint}), while the run's tokenizer has "
                f"fingerprint {tokenizer_fingerprint}: set tokenizer.path to the one or prepare the data with the other"
            )
        # As unsigned numbers, so that one comparison finds negative ids too; and as plain arrays, which slice faster.
        unsigned = np.dtype(self.manifest.dtype.replace("int32", "uint32")).newbyteorder("<")
        self._shards = [s for s in self.manifest.shards if s.tokens]
        opened = [open_shard(self.directory, self.manifest, shard) for shard in self._shards]
        self._indices = [index for index, _ in opened]
        self._arrays = [np.asarray(tokens).view(unsigned) for _, tokens in opened]
        self._ends = np.cumsum([len(array) for array in self._arrays], dtype=np.int64)
        self.tokens = self.manifest.tokens

    def split(self, length: int, held_out: int) -> Split:
        """Windows of `length` tokens, the last `held_out` kept from training; `UserError` if no other is left."""
        reserved = held_out * length + 1 if held_out else 0
        training = self.tokens - reserved
        if training < length + 1:
            raise UserError(
                f"data.sources: {self.name!r} ({self.directory}) has {self.tokens} tokens; one training sample of "
                f"data.sequence_length={length} needs {length + 1} and the data.validation.samples={held_out} held out "
                f"need {reserved}: shorten one of them or prepare more text"
            )
        windows = (training - 1) // length
        return Split(length, windows, training - 1 - windows * length, held_out, training)

    def read(self, start: int, out: np.ndarray) -> None:
        """Copies the tokens from `start` on into `out`, int64, as many as it holds.

        A token id outside of the tokenizer's vocabulary is damage: a `UserError` names the file and its offset.
        """
        shard = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while filled < len(out):
            array = self._arrays[shard]
            offset = start + filled - int(self._ends[shard] - len(array))
            piece = array[offset : offset + len(out) - filled]
            if piece.max() >= self.manifest.tokenizer.vocab_size:
                self._refuse(shard, offset, piece)
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1

    def document_starts(self, first: int, end: int) -> np.ndarray:
        """The first tokens of all documents that start in [first, end): int64, rising.

        Two binary searches in each shard that the range touches; of its index no more is read.
        """
        found = []
        for index, stop in zip(self._indices, self._ends.tolist(), strict=True):
            base = stop - index.num_tokens
            if base >= end or stop <= first:
                continue
            size = index.dtype.itemsize
            # bisect, because numpy's search would first copy the unaligned array whole.
            low, high = (
                bisect_left(index.documents, bisect_left(index.offsets, (token - base) * size), hi=index.num_documents)
                for token in (first, end)
            )
            sequences = np.array(index.documents[low:high])
            if len(sequences):
                offsets = np.array(index.offsets[sequences[0] : sequences[-1] + 1])
                starts = offsets[sequences - sequences[0]] // size + base
                found.append(starts[starts < stop])  # documents without tokens may be at a shard's end
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence, over all shards: int32. Reads a third of every index."""
        return np.concatenate([index.lengths for index in self._indices]) if self._indices else np.zeros(0, np.int32)

    def _refuse(self, shard: int, offset: int, piece: np.ndarray) -> None:
        vocab_size = self.manifest.tokenizer.vocab_size
        wrong = int(np.argmax(piece >= vocab_size))
        path = self.directory / f"{self._shards[shard].name}.bin"
        raise UserError(
            f"{path}: damaged: the token at byte {(offset + wrong) * piece.itemsize} is "
            f"{piece.astype(self.manifest.dtype)[wrong]}, outside of the tokenizer's {vocab_size} ids: "
            "prepare the data again"
        )


def gather_pieces(
    sources: Sequence[Source],
    source_P: np.ndarray,
    start_P: np.ndarray,
    length_P: np.ndarray,
    eod: int,
    out: np.ndarray,
) -> None:
    """Copies pieces into `out`, int64, one after the other; a negative source is `length` end-of-document tokens.

    A token id outside of the tokenizer's vocabulary is damage: a `UserError` names the file and its offset.
    """
    end = 0
    for source, start, length in zip(source_P.tolist(), start_P.tolist(), length_P.tolist(), strict=True):
        begin, end = end, end + length
        if source < 0:
            out[begin:end] = eod
        else:
            sources[source].read(start, out[begin:end])
