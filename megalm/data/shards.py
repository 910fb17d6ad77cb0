"""One unit of text becomes one shard: read, parse, shuffle, encode, write.

Documents are shuffled by block of about 64 MB of text (a whole unit, but for large .gz files), so that neighbours in a
file, often of one site or one repository, do not stay neighbours. What is in memory is a block of text and a batch of
tokens. The result follows from the unit, its number and the tokenizer alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megalm._indexed_dataset import Writer
from megalm.data.manifest import Shard
from megalm.data.order import Permutation
from megalm.data.sources import EMPTY, Piece, Unit, read_unit
from megalm.data.tokenizer import Tokenizer
from megalm.files import file_checksum

BLOCK_BYTES = 64 << 20  # text that is shuffled together
BATCH_BYTES = 1 << 20  # text that is encoded together
EXAMPLES = 3  # faulty records whose places are kept

Advance = Callable[[int, int], None]
"""Told what was done since the last call: bytes read from disk, tokens written."""


@dataclass(frozen=True)
class Job:
    """What is the same for all units."""

    directory: Path
    text_key: str
    dtype: str
    block_bytes: int = BLOCK_BYTES


@dataclass
class UnitResult:
    """`shard` is None if the unit has no document. `examples` are the first faulty records: piece, line, reason."""

    shard: Shard | None = None
    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[Piece, int, str]] = field(default_factory=list)


@dataclass
class _Block:
    """Documents in the order in which they were read."""

    texts: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    text_bytes: int = 0
    disk_bytes: int = 0


def write_shard(number: int, unit: Unit, job: Job, tokenizer: Tokenizer, advance: Advance) -> UnitResult:
    """Writes `shard-NUMBER.bin` and `.idx`. On failure (OSError or UserError that names the file) neither is left."""
    result = UnitResult()
    name = f"shard-{number:05d}"
    text_bytes = 0
    with Writer(job.directory / name, job.dtype) as writer:
        for block_number, block in enumerate(_blocks(unit, job, result)):
            left = block.disk_bytes
            for texts, size in _batches(block, key=number << 32 | block_number):
                tokens, lengths = tokenizer.encode_documents(texts)
                writer.append(tokens, lengths)
                share = block.disk_bytes * size // block.text_bytes
                left -= share
                advance(share, len(tokens))
            advance(left, 0)
            text_bytes += block.text_bytes
    files = [job.directory / f"{name}{suffix}" for suffix in (".bin", ".idx")]
    if writer.documents == 0:
        for file in files:
            file.unlink()
    else:
        result.shard = Shard(name, writer.documents, writer.tokens, text_bytes, *map(file_checksum, files))
    return result


def _blocks(unit: Unit, job: Job, result: UnitResult) -> Iterator[_Block]:
    """The unit's documents by block; what is left out is noted in `result`."""
    block = _Block()
    for record in read_unit(unit, job.text_key):
        result.records += 1
        block.disk_bytes += record.disk_bytes
        if record.problem:
            result.skipped[record.problem] += 1
            if record.problem != EMPTY and len(result.examples) < EXAMPLES:
                result.examples.append((record.piece, record.line, record.problem))
            continue
        text = record.text
        size = len(text) if text.isascii() else len(text.encode())
        block.texts.append(text)
        block.sizes.append(size)
        block.text_bytes += size
        if block.text_bytes >= job.block_bytes:
            yield block
            block = _Block()
    yield block


def _batches(block: _Block, key: int) -> Iterator[tuple[list[str], int]]:
    """The block's documents in the order that `key` gives, and how many bytes of text they are, batch by batch."""
    if not block.texts:
        return
    texts: list[str] = []
    size = 0
    for i in Permutation(len(block.texts), key)(np.arange(len(block.texts))).tolist():
        texts.append(block.texts[i])
        size += block.sizes[i]
        if size >= BATCH_BYTES:
            yield texts, size
            texts, size = [], 0
    if texts:
        yield texts, size
