"""Indexed datasets for tests, written from the format's table alone, with struct and numpy."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}

Documents = Sequence[Sequence[Sequence[int]]]
"""Documents of sequences of token ids; both documents and sequences may be empty."""


def content(documents: Documents, dtype: str, modes: Sequence[int] | None = None) -> tuple[bytes, bytes]:
    """The .bin and the .idx."""
    item = np.dtype(dtype).newbyteorder("<")
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    offsets = [item.itemsize * end for end in accumulate(lengths, initial=0)][:-1]
    starts = list(accumulate(map(len, documents), initial=0))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(starts))
    index += struct.pack(f"<{len(lengths)}i", *lengths)
    index += struct.pack(f"<{len(offsets)}q", *offsets)
    index += struct.pack(f"<{len(starts)}q", *starts)
    if modes is not None:
        index += struct.pack(f"<{len(modes)}b", *modes)
    return b"".join(np.array(sequence, item).tobytes() for sequence in sequences), index


def write_files(prefix: Path, documents: Documents, dtype: str, modes: Sequence[int] | None = None) -> Path:
    """Writes PREFIX.bin and PREFIX.idx; gives back the prefix."""
    for suffix, part in zip((".bin", ".idx"), content(documents, dtype, modes), strict=True):
        prefix.with_suffix(suffix).write_bytes(part)
    return prefix


def read_files(prefix: Path) -> tuple[bytes, bytes]:
    """The bytes of PREFIX.bin and PREFIX.idx."""
    return prefix.with_suffix(".bin").read_bytes(), prefix.with_suffix(".idx").read_bytes()


def documents_of(dtype: str, max_size: int = 6) -> st.SearchStrategy[list[list[list[int]]]]:
    """Documents of none to several sequences, of none to several tokens that `dtype` holds, its largest among them."""
    largest = int(np.iinfo(dtype).max)
    sequence = st.lists(st.integers(0, largest) | st.just(largest), max_size=8)
    return st.lists(st.lists(sequence, max_size=3), max_size=max_size)
