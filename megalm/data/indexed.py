"""Reads Megatron's indexed dataset, PREFIX.bin and PREFIX.idx, through csrc/indexed_dataset, whose format.hpp has the
format's table.

Files are opened when they are needed and read, never mapped, so that a file that shrinks meanwhile is an error that
names it. A `Reader` copes with whatever Megatron's builder writes: several sequences a document, documents of none,
modes, any integer type.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megalm._indexed_dataset import Reader
from megalm.data.manifest import Manifest, Shard
from megalm.errors import UserError


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that Megatron stores a vocabulary's ids in: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def open_shard(directory: Path, manifest: Manifest, shard: Shard) -> Reader:
    """Opens a shard of a prepared directory, headers and sizes checked against the manifest, contents unread.

    Raises a `UserError` that names the file.
    """
    reader = Reader(directory / shard.name)
    index = directory / f"{shard.name}.idx"
    if reader.dtype != manifest.dtype:
        raise UserError(
            f"{index}: {reader.dtype} tokens, while the manifest says {manifest.dtype}: prepare the data again"
        )
    for what, here, there in (
        ("documents", reader.documents, shard.documents),
        ("tokens", reader.tokens, shard.tokens),
    ):
        if here != there:
            raise UserError(f"{index}: {here} {what}, while the manifest says {there}: prepare the data again")
    return reader
