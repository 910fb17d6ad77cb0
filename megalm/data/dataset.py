"""A source: a prepared directory, opened as one stream of tokens, and how that stream is split.

    shard-00000 | shard-00001 | ...      one stream of T tokens, never read whole; a sample may span shards
    [ phase [ N training windows ] rest ][ V held-out windows ]

Neighbouring windows of L tokens share one token: the last label of one is the first input of the next, so each needs
L + 1. Held out are the last V windows; no training sample reads one of their tokens. Opening reads the manifest and no
other file, so that a run with thousands of shards starts at once; each .bin is opened, and its size checked, when a
sample needs it.

Shape suffix: P pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalm._indexed_dataset import OpenFiles, Stream, gather
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

    `files` are the open files of all sources of a run, so that together they keep no more open than a process may; a
    source that is given none has its own. Raises a `UserError` where the manifest is missing or damaged, or where
    another tokenizer than the run's, whose fingerprint is given, has made the tokens.
    """

    def __init__(
        self, name: str, directory: str | Path, tokenizer_fingerprint: str, files: OpenFiles | None = None
    ) -> None:
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
        self.stream = Stream(
            files if files is not None else OpenFiles(),
            self.directory,
            [shard.name for shard in self.manifest.shards],
            [shard.tokens for shard in self.manifest.shards],
            self.manifest.dtype,
            tokenizer.vocab_size,
        )
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

        A file of another size than the manifest says, or a token id outside of the tokenizer's vocabulary, is damage: a
        `UserError` names the file, and the place of the token.
        """
        gather_pieces([self], np.zeros(1, np.int64), np.array([start]), np.array([len(out)]), 0, out)

    def document_starts(self, first: int, end: int) -> np.ndarray:
        """The first tokens of all documents that start in [first, end): int64, rising.

        Of a shard's index, no more is read than binary searches and these documents need.
        """
        found = [np.zeros(0, np.int64)]
        base = 0
        for shard in self.manifest.shards:
            stop = base + shard.tokens
            if base < end and first < stop:
                reader = open_shard(self.directory, self.manifest, shard)
                found.append(reader.documents_between(max(first - base, 0), min(end, stop) - base) + base)
            base = stop
        return np.concatenate(found)

    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence, over all shards: int32. Reads a third of every index."""
        shards = [shard for shard in self.manifest.shards if shard.tokens]
        lengths = [open_shard(self.directory, self.manifest, shard).lengths() for shard in shards]
        return np.concatenate([np.zeros(0, np.int32), *lengths])


def gather_pieces(
    sources: Sequence[Source],
    source_P: np.ndarray,
    start_P: np.ndarray,
    length_P: np.ndarray,
    eod: int,
    out: np.ndarray,
) -> None:
    """Fills `out`, int64[sum of length_P], with pieces of the sources, in one native call that does not hold the GIL.

    Piece p is `length_P[p]` tokens from token `start_P[p]` of source number `source_P[p]`, across the shards' borders;
    source -1 stands for `length_P[p]` times the token `eod`. All int64. Raises what `Source.read` raises.
    """
    streams = {number: sources[number].stream for number in set(source_P.tolist()) if number != -1}
    source_P, start_P, length_P = (np.ascontiguousarray(column) for column in (source_P, start_P, length_P))
    gather(streams, source_P, start_P, length_P, eod, out)
