"""Records are handed on whole, whatever kind of file they are from."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path

import orjson
import pytest

from megalm.data.curation.documents import read_documents
from megalm.data.sources import list_files, make_units
from megalm.errors import UserError

TEXTS = [f"document {i} é" for i in range(1000)]


def lines(path: Path, unit_bytes: int = 1 << 20) -> list[bytes]:
    units = make_units(list_files([path]).files, unit_bytes)
    return [document.line for unit in units for document in read_documents(unit, "text")]


def test_lines_are_handed_on_as_they_stand(tmp_path: Path) -> None:
    content = [b'{"text": "a", "x": 1.0}', b' {"x":1e2,"text":"b"} ', b"{faulty", b'{"no": "text"}']
    (tmp_path / "a.jsonl").write_bytes(b"\r\n\n".join(content))
    assert lines(tmp_path / "a.jsonl") == lines(tmp_path / "a.jsonl", unit_bytes=10) == content
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(content) + b"\n"))
    assert lines(tmp_path / "b.jsonl.gz") == content


def test_a_text_file_becomes_a_json_object_of_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('two\nlines "é"\n')
    assert [json.loads(line) for line in lines(tmp_path / "a.txt")] == [{"text": 'two\nlines "é"\n'}]
    (tmp_path / "a.txt").write_bytes(b"\xff")
    assert lines(tmp_path / "a.txt") == [b""]


def test_rows_are_handed_on_with_all_their_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    day = datetime.datetime(2024, 5, 6, 7)
    rows = [{"id": i, "text": text, "when": day, "deep": [{"a": i / 2}], "no": None} for i, text in enumerate(TEXTS)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=300)
    wanted = [orjson.dumps(row) for row in rows]
    assert lines(path) == lines(path, unit_bytes=1000) == wanted


def test_a_column_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a"], "blob": [b"\xff"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: a row cannot be written as JSON"):
        lines(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": [b"bytes that are text"]}), tmp_path / "b.parquet")
    assert lines(tmp_path / "b.parquet") == [b'{"text":"bytes that are text"}']
