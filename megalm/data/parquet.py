"""Reads one text column of a .parquet file, batch by batch; the only module that imports pyarrow.

pyarrow is large, so it comes with an extra and is imported when there is a .parquet file to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalm.errors import UserError

ROWS = 256  # decoded together; documents are seldom above a megabyte
READ_BYTES = 1 << 20  # a column chunk may be larger than memory: it is read through a buffer


def row_groups(path: Path) -> list[tuple[int, int]]:
    """The size of each row group of `path` on the disk and uncompressed, in bytes; one of no bytes if there is none."""
    with _opened(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        sizes = []
        for group in groups:
            columns = [group.column(i) for i in range(group.num_columns)]
            sizes.append((sum(c.total_compressed_size for c in columns), group.total_byte_size))
        return sizes or [(0, 0)]


def rows_before(path: Path, row_group: int) -> int:
    """The number of rows in the row groups before `row_group`."""
    with _opened(path) as file:
        return sum(file.metadata.row_group(i).num_rows for i in range(row_group))


def read_column(path: Path, start: int, end: int, key: str) -> Iterator[tuple[list[bytes | None], int]]:
    """The values of column `key` in the row groups [start, end), a few at a time, each with the number of all rows.

    A null is None. A `UserError` names the file if it is damaged or has no such column of text or bytes.
    """
    import pyarrow
    from pyarrow import types

    with _opened(path) as file:
        schema = file.schema_arrow
        if key not in schema.names:
            raise UserError(f"{path}: no column {key!r}: its columns are {', '.join(schema.names)}: give --text-key")
        kind = schema.field(key).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        texts = (types.is_string, types.is_large_string, types.is_string_view)
        binaries = (types.is_binary, types.is_large_binary, types.is_binary_view)
        if not any(is_kind(kind) for is_kind in (*texts, *binaries)):
            raise UserError(f"{path}: column {key!r} holds {kind} and no text: give another --text-key")
        wanted = list(range(start, min(end, file.metadata.num_row_groups)))
        num_rows = sum(file.metadata.row_group(i).num_rows for i in wanted)
        for batch in file.iter_batches(ROWS, row_groups=wanted, columns=[key], use_threads=False):
            column = batch.column(0)
            if types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # As bytes: pyarrow does not check that what is declared text is UTF-8.
            yield column.cast(pyarrow.large_binary()).to_pylist(), num_rows


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, open; what pyarrow says of a damaged one becomes a `UserError`."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(
            f"{path}: reading .parquet files needs pyarrow: install it with `pip install 'megalm[parquet]'`"
        ) from None
    try:
        with ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
            yield file
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged parquet file ({reason}): mend it or leave it out") from None
    except OSError as error:
        if error.errno is not None:
            raise
        reason = " ".join(str(error).split())  # pyarrow's for a page that cannot be decompressed
        raise UserError(f"{path}: damaged parquet file ({reason}): mend it or leave it out") from None
