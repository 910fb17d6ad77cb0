from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megalm.data.sources import File, Piece, Record, Unit, list_files, make_units, read_unit, where
from megalm.errors import UserError


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def units_of(files: Sequence[Path], unit_bytes: int = 1 << 20) -> list[Unit]:
    return make_units([File(path, "in") for path in files], unit_bytes)


def read(files: Sequence[Path], unit_bytes: int = 1 << 20, key: str = "text") -> list[Record]:
    return [record for unit in units_of(files, unit_bytes) for record in read_unit(unit, key)]


def place(record: Record) -> str:
    return where(record.piece.path, record.piece.start, record.line)


def texts(files: Sequence[Path], unit_bytes: int = 1 << 20) -> list[str]:
    return [record.text for record in read(files, unit_bytes) if not record.problem]


LINE = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(lambda text: lines("x" + text)),
    st.sampled_from(
        [b"\n", b"  \r\n", b"{oops\n", b"[1]\n", b'{"text": 3}\n', b"\xff\n", lines("crlf")[:-1] + b"\r\n"]
    ),
)


@given(st.lists(st.lists(LINE, max_size=8), min_size=1, max_size=3), st.integers(1, 200), st.booleans())
def test_records_and_their_line_numbers_do_not_depend_on_how_files_are_cut(
    tmp_path_factory: pytest.TempPathFactory, contents: list[list[bytes]], unit_bytes: int, final_newline: bool
) -> None:
    directory = tmp_path_factory.mktemp("sources")
    files = []
    expected = []
    for i, content in enumerate(contents):
        files.append(directory / f"{i}.jsonl")
        whole = b"".join(content)
        files[-1].write_bytes(whole if final_newline else whole.removesuffix(b"\n"))
        for number, line in enumerate(content, start=1):
            if line.strip():
                try:
                    text = json.loads(line)["text"]
                except (ValueError, TypeError):
                    text = None
                expected.append((f"{files[-1]}:{number}", text if isinstance(text, str) else ""))
    records = read(files, unit_bytes)
    assert [(place(r), r.text) for r in records] == expected
    blank_at_the_end = 2 + sum(len(line) for content in contents for line in content if not line.strip())
    read_bytes, whole_bytes = sum(r.disk_bytes for r in records), sum(file.stat().st_size for file in files)
    assert whole_bytes - blank_at_the_end <= read_bytes <= whole_bytes


def test_units_are_about_as_large_as_asked_whatever_the_files(tmp_path: Path) -> None:
    sizes = {"a.jsonl": 2500, "b.txt": 10, "c.txt": 3000, "d.jsonl": 700, "e.jsonl.gz": 400, "f.txt": 0, "g.txt": 100}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    units = units_of([tmp_path / name for name in sizes], 1000)
    assert [[(piece.path.name, piece.start, piece.end) for piece in unit] for unit in units] == [
        [("a.jsonl", 0, 1000)],
        [("a.jsonl", 1000, 2000)],
        [("a.jsonl", 2000, 2500), ("b.txt", 0, 10)],
        [("c.txt", 0, 3000)],
        [("d.jsonl", 0, 700)],
        [("e.jsonl.gz", 0, 400)],  # about 1600 bytes of text
        [("f.txt", 0, 0), ("g.txt", 0, 100)],
    ]


def test_a_text_file_is_one_document_with_its_line_ends_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("a\r\nb\n\n é".encode())
    assert texts([tmp_path / "a.txt"]) == ["a\r\nb\n\n é"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines("world"))
    assert texts(sorted(tmp_path.iterdir())) == ["hello", "world"]


def test_gzip_files_of_one_or_several_members_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines("one", "two")) + gzip.compress(lines("three")))
    records = read([tmp_path / "a.jsonl.gz"])
    assert [record.text for record in records] == ["one", "two", "three"]
    assert sum(record.disk_bytes for record in records) == (tmp_path / "a.jsonl.gz").stat().st_size


@pytest.mark.parametrize("damage", ["cut", "altered", "no gzip"])
def test_a_damaged_gzip_file_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    content = bytearray(gzip.compress(lines(*map(str, range(1000)))))
    path = tmp_path / "a.jsonl.gz"
    if damage == "altered":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes({"cut": content[:-20], "altered": content, "no gzip": lines("plain")}[damage])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: damaged gzip file"):
        read([path])


def test_zstandard_files_of_one_or_several_frames_are_read(tmp_path: Path) -> None:
    whole = zstandard.ZstdCompressor().compress(lines("one", "two"))
    chunked = zstandard.ZstdCompressor().compressobj()  # a frame that does not tell its size
    (tmp_path / "a.jsonl.zst").write_bytes(whole + chunked.compress(lines("three")) + chunked.flush())
    records = read([tmp_path / "a.jsonl.zst"])
    assert [record.text for record in records] == ["one", "two", "three"]
    assert sum(record.disk_bytes for record in records) == (tmp_path / "a.jsonl.zst").stat().st_size


def test_a_zstandard_file_with_the_largest_window_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(lines("one")) + packer.flush())
    assert texts([tmp_path / "a.jsonl.zst"]) == ["one"]


@pytest.mark.parametrize("damage", ["cut", "altered", "no zstandard"])
def test_a_damaged_zstandard_file_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    content = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(lines(*map(str, range(1000)))))
    path = tmp_path / "a.jsonl.zst"
    if damage == "altered":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes({"cut": content[:-20], "altered": content, "no zstandard": lines("plain")}[damage])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: damaged zstandard file"):
        read([path])


def write_parquet(path: Path, column: pyarrow.Array, key: str = "text", rows: int = 3) -> Path:
    table = pyarrow.table({"number": list(range(len(column))), key: column})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)
    return path


PARQUET_TYPES = [
    pyarrow.string(),
    pyarrow.large_string(),
    pyarrow.binary(),
    pyarrow.large_binary(),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
]


@pytest.mark.parametrize("kind", PARQUET_TYPES, ids=str)
def test_a_parquet_column_is_read_as_the_same_lines_would_be(tmp_path: Path, kind: pyarrow.DataType) -> None:
    values = ["one", "", "zwei é", None, "三 😀", " \n", *map(str, range(7))]
    column = pyarrow.array(values, pyarrow.string())
    column = column.dictionary_encode() if pyarrow.types.is_dictionary(kind) else column.cast(kind)
    path = write_parquet(tmp_path / "a.parquet", column)
    (tmp_path / "a.jsonl").write_bytes(b"".join(json.dumps({"text": v}).encode() + b"\n" for v in values))
    for unit_bytes in (1, 1000, 1 << 20):
        records = read([path], unit_bytes)
        assert [(r.text, r.problem) for r in records] == [(r.text, r.problem) for r in read([tmp_path / "a.jsonl"])]
        assert [place(r) for r in records] == [f"{path}: row {i}" for i in range(1, len(values) + 1)]
        pieces = [piece for unit in units_of([path], unit_bytes) for piece in unit]
        assert sum(record.disk_bytes for record in records) == sum(piece.disk_bytes for piece in pieces)


def test_row_groups_are_the_units_of_a_large_parquet_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", pyarrow.array([str(i) * 1000 for i in range(8)]), rows=2)
    size = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).total_byte_size
    for unit_bytes, expected in (
        (1, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (2 * size, [(0, 2), (2, 4)]),
        (1 << 20, [(0, 4)]),
    ):
        units = units_of([path], unit_bytes)
        assert [[(piece.start, piece.end) for piece in unit] for unit in units] == [[pair] for pair in expected]


def test_text_in_parquet_that_is_no_utf8_has_its_reason(tmp_path: Path) -> None:
    column = pyarrow.array([b"good", b"b\xffd"]).view(pyarrow.string())
    records = read([write_parquet(tmp_path / "a.parquet", column)])
    assert [(record.text, record.problem) for record in records] == [("good", ""), ("", "invalid UTF-8")]


def test_an_empty_parquet_file_has_no_record(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", pyarrow.array([], pyarrow.string()))
    assert len(units_of([path])) == 1
    assert read([path]) == []


def test_parquet_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", pyarrow.array(["x" * 1000] * 9))
    with pytest.raises(UserError, match=r"a\.parquet: no column 'body': its columns are number, text: give --text-key"):
        read([path], key="body")
    with pytest.raises(
        UserError, match=r"a\.parquet: column 'number' holds int64 and no text: give another --text-key"
    ):
        read([path], key="number")
    content = path.read_bytes()
    for damaged in (content[:-5], b"", b"PAR1 no parquet PAR1", b"\xff" * 300 + content[300:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.parquet: damaged parquet file \(.+\): mend it or leave it out"):
            read([path])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a\.parquet: reading \.parquet files needs pyarrow: install it with"):
        units_of([path])


def test_a_json_file_is_lines_where_it_is_named_and_nothing_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(lines("one", "two"))
    (tmp_path / "b.jsonl").write_bytes(lines("three"))
    assert texts([file.path for file in list_files([tmp_path / "a.json"]).files], unit_bytes=5) == ["one", "two"]
    assert texts([file.path for file in list_files([tmp_path]).files]) == ["three"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "a"', "malformed JSON"),
        (b'{"text": "\\ud800"}', "malformed JSON"),
        (b'{"text": NaN}', "malformed JSON"),
        (b'{"text": "a"} {"text": "b"}', "malformed JSON"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b'"text"', "not a JSON object"),
        (b"{}", "no 'text' field"),
        (b'{"text": null}', "'text' is not a string"),
        (b'{"text": ""}', "empty"),
        (b'{"text": " \\n\\t"}', "empty"),
    ],
)
def test_a_line_without_a_text_has_its_reason(tmp_path: Path, line: bytes, problem: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("before") + line + b"\n" + lines("after"))
    records = read([tmp_path / "a.jsonl"])
    assert [record.problem for record in records] == ["", problem, ""]
    assert place(records[1]) == f"{tmp_path}/a.jsonl:2"


@pytest.mark.parametrize(("content", "problem"), [(b"", "empty"), (b" \n", "empty"), (b"a\xffb", "invalid UTF-8")])
def test_a_text_file_without_a_text_has_its_reason(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (record,) = read([tmp_path / "a.txt"])
    assert (record.text, record.problem) == ("", problem)
    assert place(record) == f"{tmp_path}/a.txt"


def test_a_folder_is_read_in_full_sorted_and_tells_what_it_leaves_alone(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.jsonl", "b.jsonl.gz", "b/x.json", "README", "c/y.json", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    listing = list_files([tmp_path])
    assert {file.source for file in listing.files} == {str(tmp_path)}
    assert [str(file.path.relative_to(tmp_path)) for file in listing.files] == [
        "a.jsonl",
        "b/10.txt",
        "b/2.txt",
        "b.jsonl.gz",
    ]
    assert listing.ignored == {".json": 2, "no suffix": 1}


def test_the_order_in_which_inputs_are_named_does_not_matter(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(b"x")
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert list_files(paths) == list_files(paths[::-1])


def test_inputs_that_cannot_be_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("a.txt", "a.pdf"):
        (tmp_path / name).write_bytes(b"x")
    for inputs, reason in (
        ([], "nothing given"),
        ([tmp_path / "nowhere"], "nowhere: no such file or folder"),
        ([tmp_path / "empty"], "empty: no .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt file in this folder"),
        ([tmp_path / "a.pdf"], r"a\.pdf: not a text file that megalm reads"),
        ([tmp_path, tmp_path / "a.txt"], r"a\.txt: given twice"),
    ):
        with pytest.raises(UserError, match=reason):
            list_files(inputs)


def test_a_line_belongs_to_the_piece_that_it_starts_in(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("a", "b" * 100, "c"))
    second = len(lines("a"))
    for cut in range(1, path.stat().st_size):
        size = path.stat().st_size
        pieces = [Piece(path, a, b, b - a, b - a, "in") for a, b in ((0, cut), (cut, size))]
        first, rest = ([r.text for r in read_unit((piece,), "text")] for piece in pieces)
        assert [*first, *rest] == ["a", "b" * 100, "c"]
        assert ("b" * 100 in first) == (cut > second)


def test_a_pipe_in_a_folder_is_left_alone_and_a_named_one_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"no .* file in this folder"):
        list_files([tmp_path])
    with pytest.raises(UserError, match="not a text file that megalm reads"):
        list_files([tmp_path / "pipe.txt"])
