"""Reads Megatron's indexed dataset: tokens in a .bin, where each sequence and document lies in an .idx.

    .bin   token ids, sequences back to back, no header
    .idx   offset 0   9 bytes    "MMIDIDX\\0\\0"
                  9   u64        version, 1
                 17   u8         dtype code (DTYPES)
                 18   u64        S, sequences
                 26   u64        D + 1, documents and one
                 34   i32[S]     tokens of each sequence
                      i64[S]     byte offset of each sequence in the .bin
                      i64[D+1]   first sequence of each document, and S at the end
                      i8[S]      modes, in multimodal data only; nothing but the file's size tells

All little-endian. The arrays start at offset 34, so they are unaligned; numpy copes. The files are written by
csrc/indexed_dataset. Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalm.data.manifest import Manifest, Shard
from megalm.errors import UserError

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
INTEGERS = (1, 2, 3, 4, 5, 8)


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that Megatron stores a vocabulary's ids in: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


@dataclass(frozen=True)
class Index:
    """An open .idx; its arrays are mapped, not read."""

    path: Path
    dtype: np.dtype
    lengths: np.ndarray
    """int32[S]: tokens of each sequence."""
    offsets: np.ndarray
    """int64[S]: byte offset of each sequence in the .bin."""
    documents: np.ndarray
    """int64[D + 1]: first sequence of each document, and S at the end."""

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the .bin, from the last sequence's place: O(1)."""
        if len(self.lengths) == 0:
            return 0
        return int(self.offsets[-1]) // self.dtype.itemsize + int(self.lengths[-1])

    def verify(self) -> None:
        """Checks every entry; a `UserError` names the file and the first that is wrong. Reads the whole file."""
        if (negative := np.flatnonzero(self.lengths < 0)).size:
            raise UserError(
                f"{self.path}: damaged: sequence {negative[0]} has a negative length: prepare the data again"
            )
        ends = np.cumsum(self.lengths, dtype=np.int64) * self.dtype.itemsize
        if (wrong := np.flatnonzero(self.offsets != np.concatenate([[0], ends[:-1]])[: len(ends)])).size:
            raise UserError(
                f"{self.path}: damaged: sequence {wrong[0]} does not start where the one before it ends: "
                "prepare the data again"
            )
        documents = self.documents
        if documents[0] != 0 or documents[-1] != len(self.lengths) or bool((np.diff(documents) < 0).any()):
            raise UserError(f"{self.path}: damaged: its documents do not cover its sequences: prepare the data again")


def open_index(path: Path) -> Index:
    """Opens an .idx after checking its header against its size; a `UserError` names the file where they disagree."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER.size)
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing: prepare the data again") from None

    def damaged(reason: str) -> UserError:
        return UserError(f"{path}: corrupt index: {reason}: prepare the data again")

    if len(header) < HEADER.size:
        raise damaged(f"{size} bytes are less than a header's {HEADER.size}")
    magic, version, code, sequences, documents = HEADER.unpack(header)
    if magic != MAGIC:
        raise damaged(f"it starts with {magic!r} and not with {MAGIC!r}")
    if version != VERSION:
        raise damaged(f"version {version} is not {VERSION}")
    if code not in INTEGERS:
        raise damaged(f"dtype code {code} is not one of an integer type")
    if documents < 1:
        raise damaged("it has no document table")
    plain = HEADER.size + 12 * sequences + 8 * documents
    if size not in (plain, plain + sequences):
        raise damaged(f"{size} bytes, while {sequences} sequences and {documents - 1} documents make {plain}")

    def mapped(kind: str, count: int, offset: int) -> np.ndarray:
        if count == 0:
            return np.zeros(0, kind)
        return np.memmap(path, dtype=kind, mode="r", offset=offset, shape=(count,))

    lengths = mapped("<i4", sequences, HEADER.size)
    offsets = mapped("<i8", sequences, HEADER.size + 4 * sequences)
    return Index(path, np.dtype(DTYPES[code]), lengths, offsets, mapped("<i8", documents, HEADER.size + 12 * sequences))


def open_tokens(path: Path, dtype: np.dtype, tokens: int) -> np.ndarray:
    """Maps a .bin of `tokens` ids: dtype[tokens], read only; a `UserError` names the file if its size is another."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing: prepare the data again") from None
    if size != tokens * dtype.itemsize:
        length = "short" if size < tokens * dtype.itemsize else "long"
        raise UserError(
            f"{path}: too {length}: {size} bytes, while {tokens} {dtype.name} tokens are {tokens * dtype.itemsize}: "
            "prepare the data again"
        )
    if tokens == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(tokens,))


def open_shard(directory: Path, manifest: Manifest, shard: Shard) -> tuple[Index, np.ndarray]:
    """Opens a shard of a prepared directory, headers and sizes checked against the manifest, contents unread.

    Returns the index and the tokens, dtype[shard.tokens], both mapped. Raises a `UserError` that names the file.
    """
    index = open_index(directory / f"{shard.name}.idx")
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    if index.dtype != dtype:
        raise UserError(f"{index.path}: {index.dtype.name} tokens, while the manifest says {manifest.dtype}")
    for what, here, there in (
        ("documents", index.num_documents, shard.documents),
        ("tokens", index.num_tokens, shard.tokens),
    ):
        if here != there:
            raise UserError(f"{index.path}: {here} {what}, while the manifest says {there}: prepare the data again")
    return index, open_tokens(directory / f"{shard.name}.bin", dtype, shard.tokens)
