"""Whole records: a document's text together with the JSON line that it is kept as.

A line of JSON is kept as it stands, byte for byte. A row of a .parquet becomes a JSON object of all its columns, a .txt
one of its text alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from megalm.data.sources import Piece, Record, Unit, read_unit
from megalm.errors import UserError

ROWS = 256  # of a .parquet, decoded together


class Document(NamedTuple):
    """A record, `number` counting from 1 those of its piece, the `piece`-th of its unit. `line` is the JSON object that
    it is kept as, without a line end; empty where the record has a problem and was not a line."""

    record: Record
    piece: int
    number: int
    line: bytes


def read_documents(unit: Unit, text_key: str) -> Iterator[Document]:
    """The unit's records, as `read_unit` gives them, whole."""
    for i, piece in enumerate(unit):
        records = read_unit((piece,), text_key)
        pairs: Iterable[tuple[Record, bytes]]
        if is_parquet(piece):
            pairs = zip(records, read_rows(piece, text_key), strict=True)
        else:
            pairs = ((record, _line(record, text_key)) for record in records)
        for number, (record, line) in enumerate(pairs, start=1):
            yield Document(record, i, number, line)


def is_parquet(piece: Piece) -> bool:
    return piece.path.name.endswith(".parquet")


def _line(record: Record, text_key: str) -> bytes:
    if record.raw:
        return record.raw.rstrip(b"\r\n")
    return b"" if record.problem else orjson.dumps({text_key: record.text})


def read_rows(piece: Piece, text_key: str) -> Iterator[bytes]:
    """The rows of a piece of a .parquet as JSON objects; its bounds are row groups. Texts may be bytes."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(piece.path) as file:
            groups = range(piece.start, min(piece.end, file.metadata.num_row_groups))
            for batch in file.iter_batches(ROWS, row_groups=list(groups), use_threads=False):
                for row in batch.to_pylist():
                    yield _dump(row, piece.path, text_key)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{piece.path}: a column cannot be read ({reason}): mend it or leave it out") from None


def _dump(row: dict[str, Any], path: Path, text_key: str) -> bytes:
    if isinstance(text := row.get(text_key), bytes):
        row[text_key] = text.decode(errors="replace")  # reading has refused it already if it is not UTF-8
    try:
        return orjson.dumps(row)
    except TypeError as error:
        raise UserError(f"{path}: a row cannot be written as JSON ({error}): leave that column out") from None
