"""Prepared directories for tests, written byte by byte here so that the package's own writer is not trusted."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path


def write_prepared(
    directory: Path,
    shards: Sequence[Sequence[Sequence[int]]],
    dtype: str = "int32",
    eod: int = 0,
    vocab_size: int = 2**31 - 1,
    tokenizer_fingerprint: str = "f00d",
) -> Path:
    """Makes `directory` of `shards`, each a list of documents, each a list of token ids."""
    directory.mkdir()
    code, letter, size = {"int32": (4, "i", 4), "uint16": (8, "H", 2)}[dtype]
    records = []
    for number, documents in enumerate(shards):
        lengths = [len(document) for document in documents]
        offsets = [size * sum(lengths[:i]) for i in range(len(lengths))]
        tokens = [token for document in documents for token in document]
        count = len(documents)
        content = struct.pack(f"<{len(tokens)}{letter}", *tokens)
        index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, count, count + 1)
        index += struct.pack(f"<{count}i", *lengths) + struct.pack(f"<{count}q", *offsets)
        index += struct.pack(f"<{count + 1}q", *range(count + 1))
        stem = f"shard-{number:05d}"
        (directory / f"{stem}.bin").write_bytes(content)
        (directory / f"{stem}.idx").write_bytes(index)
        records.append(
            {
                "name": stem,
                "documents": count,
                "tokens": len(tokens),
                "text_bytes": 4 * len(tokens),
                "bin_checksum": hashlib.md5(content).hexdigest(),
                "idx_checksum": hashlib.md5(index).hexdigest(),
            }
        )
    manifest = {
        "format": "megalm-data",
        "version": 1,
        "tokenizer": {
            "path": "tokenizers/test",
            "kind": "bpe",
            "fingerprint": tokenizer_fingerprint,
            "vocab_size": vocab_size,
            "eod": eod,
        },
        "dtype": dtype,
        "skipped": {},
        "shards": records,
        **{total: sum(record[total] for record in records) for total in ("documents", "tokens", "text_bytes")},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory
