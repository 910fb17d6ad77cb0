"""Looks into a prepared directory: what do its documents read like, and what does training make of them?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from megalm.data.dataset import Source
from megalm.data.indexed import open_shard
from megalm.data.loader import windows
from megalm.data.manifest import Manifest
from megalm.data.tokenizer import Tokenizer
from megalm.errors import UserError


class Document(NamedTuple):
    """A decoded document and where it lies."""

    shard: str
    document: int
    tokens: int
    text: str


def documents(directory: Path, manifest: Manifest, tokenizer: Tokenizer, count: int) -> Iterator[Document]:
    """Up to `count` documents, evenly spaced over all of them, decoded by the tokenizer that the manifest names."""
    _check(directory, manifest, tokenizer)
    count = min(count, manifest.documents)
    wanted = iter([i * manifest.documents // count for i in range(count)])
    number = next(wanted, None)
    first = 0
    for shard in manifest.shards:
        while number is not None and number < first + shard.documents:
            ids = open_shard(directory, manifest, shard).document(number - first)
            yield Document(shard.name, number - first, len(ids), tokenizer.decode(ids))
            number = next(wanted, None)
        first += shard.documents


class Segment(NamedTuple):
    """A document's part in a training sample, decoded: `first` of the sample's tokens and how many, and how many of
    them have their next token in the loss. `ended` if the document's end is in it."""

    first: int
    tokens: int
    in_loss: int
    ended: bool
    text: str


class Sample(NamedTuple):
    """A training sample: its number, of how many, its first token in the directory, and its documents' parts."""

    number: int
    of: int
    first: int
    segments: list[Segment]


def num_samples(manifest: Manifest, length: int) -> int:
    """Windows of `length` tokens and one label, back to back."""
    return max(0, (manifest.tokens - 1) // length)


def sample(directory: Path, manifest: Manifest, tokenizer: Tokenizer, number: int, length: int) -> Sample:
    """The `number`-th window of `length` tokens, as training reads one whose attention stays inside of documents.

    A `UserError` says that there is none, or that this is not the tokenizer that the manifest names.
    """
    _check(directory, manifest, tokenizer)
    source = Source(directory.name, directory, tokenizer.fingerprint)
    count = num_samples(manifest, length)
    if not 0 <= number < count:
        has = f"samples 0 to {count - 1}" if count > 0 else "no sample"
        raise UserError(
            f"--sample {number}: the {source.tokens} tokens of {directory} make {has} of --sequence-length {length}: "
            "choose another, or a shorter length"
        )
    first = number * length
    (batch,) = windows(source, 0, first, 1, length, 1, tokenizer.eod, document_attention=True)
    segments = []
    for start, end in pairwise(batch.segments.tolist()):
        ids = batch.tokens_T[start:end]
        in_loss = int(batch.loss_mask_T[start:end].sum())
        ended = bool(ids[-1] == tokenizer.eod)
        segments.append(Segment(start, end - start, in_loss, ended, tokenizer.decode(ids[: len(ids) - ended])))
    return Sample(number, count, first, segments)


def _check(directory: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
        raise UserError(
            f"the tokenizer is not the one that {directory} was prepared with: give that one, which then was "
            f"{manifest.tokenizer.path}, with --tokenizer"
        )
