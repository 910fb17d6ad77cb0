"""One unit of text becomes one shard: read, parse, shuffle, encode, write.

Documents are shuffled by block of about 64 MB of text (a whole unit, but for large compressed files), so that
neighbours in a file, often of one site or one repository, do not stay neighbours. What is in memory is a block of text,
as UTF-8, and a batch of tokens; and a document that is larger than both, a few times over. The result follows from the
unit, its number, the job and the tokenizer alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megalm._indexed_dataset import Writer
from megalm.data.counts import Counts, Fault
from megalm.data.engine import Encoder
from megalm.data.manifest import Shard
from megalm.data.order import Permutation
from megalm.data.sources import EMPTY, Unit, read_unit
from megalm.files import file_checksum

BLOCK_BYTES = 64 << 20  # text that is shuffled together
EXAMPLES = 3  # faulty records whose places are kept

Advance = Callable[[int, int], None]
"""Told what was done since the last call: bytes read from disk, tokens written."""


class Job(NamedTuple):
    """What is the same for all units. `eod` ends each document unless it is None."""

    directory: Path
    text_key: str
    dtype: str
    eod: int | None
    shuffle: bool = True
    block_bytes: int = BLOCK_BYTES


@dataclass
class UnitResult:
    """`shard` is None if the unit has no document. `counts` is by source; `faults` are the first faulty records."""

    shard: Shard | None = None
    counts: dict[str, Counts] = field(default_factory=lambda: defaultdict(Counts))
    faults: list[Fault] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "shard": asdict(self.shard) if self.shard else None,
            "counts": {source: counts.to_json() for source, counts in self.counts.items()},
            "faults": self.faults,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> UnitResult:
        return cls(
            Shard(**content["shard"]) if content["shard"] else None,
            {source: Counts.from_json(counts) for source, counts in content["counts"].items()},
            [Fault(*fault) for fault in content["faults"]],
        )


class _Document(NamedTuple):
    content: bytes
    source: str


@dataclass
class _Block:
    """Documents in the order in which they were read."""

    documents: list[_Document | None] = field(default_factory=list)
    text_bytes: int = 0
    disk_bytes: int = 0


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def write_shard(number: int, unit: Unit, job: Job, encoder: Encoder, advance: Advance) -> UnitResult:
    """Writes `shard-NUMBER.bin` and `.idx`. On failure (OSError or UserError that names the file) neither is left."""
    result = UnitResult()
    name = shard_name(number)
    with Writer(job.directory / name, job.dtype) as writer:
        for block_number, block in enumerate(_blocks(unit, job, result)):
            left = block.disk_bytes
            whole = block.text_bytes
            key = number << 32 | block_number if job.shuffle else None
            for batch, size in _batches(block, key, encoder.batch_bytes):
                tokens, lengths = encoder.encode_documents([document.content for document in batch])
                tokens, lengths = _ended(tokens, lengths, job.eod)
                _count(batch, lengths, result)
                writer.append(tokens, lengths[lengths > 0])
                share = block.disk_bytes * size // whole
                left -= share
                advance(share, len(tokens))
            advance(left, 0)
    files = [job.directory / f"{name}{suffix}" for suffix in (".bin", ".idx")]
    if writer.documents == 0:
        for file in files:
            file.unlink()
    else:
        text_bytes = sum(counts.text_bytes for counts in result.counts.values())
        result.shard = Shard(name, writer.documents, writer.tokens, text_bytes, *map(file_checksum, files))
    return result


def _blocks(unit: Unit, job: Job, result: UnitResult) -> Iterator[_Block]:
    """The unit's documents by block; what is left out is noted in `result`."""
    block = _Block()
    for record in read_unit(unit, job.text_key):
        piece, problem = record.piece, record.problem
        counts = result.counts[piece.source]
        counts.records += 1
        block.disk_bytes += record.disk_bytes
        if problem:
            counts.skipped[problem] += 1
            if problem != EMPTY and len(result.faults) < EXAMPLES:
                result.faults.append(Fault(str(piece.path), piece.start, piece.end, record.line, problem))
            continue
        content = record.text.encode()
        block.documents.append(_Document(content, piece.source))
        block.text_bytes += len(content)
        if block.text_bytes >= job.block_bytes:
            yield block
            block = _Block()
    yield block


def _batches(block: _Block, key: int | None, batch_bytes: int) -> Iterator[tuple[list[_Document], int]]:
    """The block's documents in the order that `key` gives, or as they are if it is None, and how many bytes of text
    they are, batch by batch. The block is emptied on the way, so that no text is kept twice."""
    if not block.documents:
        return
    places = np.arange(len(block.documents))
    batch: list[_Document] = []
    size = 0
    for i in (places if key is None else Permutation(len(places), key)(places)).tolist():
        document = block.documents[i]
        assert document is not None
        block.documents[i] = None
        batch.append(document)
        size += len(document.content)
        if size >= batch_bytes:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def _ended(tokens: np.ndarray, lengths: np.ndarray, eod: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Documents with `eod` after each that has tokens, if it is not None."""
    if eod is None:
        return tokens, lengths
    lengths = lengths + (lengths > 0)
    ends = np.cumsum(lengths[lengths > 0])
    ended = np.empty(len(tokens) + len(ends), tokens.dtype)
    ended[ends - 1] = eod
    if len(tokens) > 200 * len(ends):  # a copy a document is faster than a mask, unless documents are short
        start = 0
        for number, end in enumerate(ends.tolist()):
            ended[start : end - 1] = tokens[start - number : end - 1 - number]
            start = end
    else:
        is_text = np.ones(len(ended), bool)
        is_text[ends - 1] = False
        ended[is_text] = tokens
    return ended, lengths


def _count(batch: list[_Document], lengths: np.ndarray, result: UnitResult) -> None:
    """Notes a batch; a document that a tokenizer makes nothing of is empty."""
    for document, length in zip(batch, lengths.tolist(), strict=True):
        counts = result.counts[document.source]
        if length == 0:
            counts.skipped[EMPTY] += 1
        else:
            counts.documents += 1
            counts.tokens += length
            counts.text_bytes += len(document.content)
