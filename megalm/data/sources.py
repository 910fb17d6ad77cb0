"""Streams documents out of text files.

    inputs (files and folders)  -> list_files ->  .jsonl, .jsonl.gz, .jsonl.zst, .parquet and .txt files, sorted
    files                       -> make_units ->  units of about 64 MB: what one worker takes at a time
    a unit                      -> read_unit  ->  records: a document's text, or the reason why there is none

A .jsonl file has a JSON object a line, its text under one key; a large one is cut into byte ranges, and a line belongs
to the range that its first byte lies in. A .parquet file has its text in one column and is cut between row groups. A
.txt file is one document. Small files share a unit; a compressed .jsonl is read from its beginning and never cut. What
a unit holds follows from the files alone.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from megalm.errors import UserError

COMPRESSED = (".jsonl.gz", ".jsonl.zst")
SUFFIXES = (".jsonl", *COMPRESSED, ".parquet", ".txt")
NAMED = (".json",)  # JSON lines as well, if the file is named; what a folder holds of them may be anything
UNIT_BYTES = 64 << 20
RATIO = 4  # text is about this many times larger than its compressed file
BOM = b"\xef\xbb\xbf"
EMPTY = "empty"


class File(NamedTuple):
    """A text file, and the input that it was found through."""

    path: Path
    source: str


class Piece(NamedTuple):
    """A part of a file: row groups [start, end) of a .parquet, bytes [start, end) of any other, and only a .jsonl is
    ever cut. `disk_bytes` is its size as it lies on the disk, `text_bytes` about that of the text inside."""

    path: Path
    start: int
    end: int
    disk_bytes: int
    text_bytes: int
    source: str


Unit = tuple[Piece, ...]


class Record(NamedTuple):
    """A document, or a place where one should be. `problem` is "" if there is a text, else why it is left out."""

    text: str
    problem: str
    piece: Piece
    line: int
    """From 1 at the piece's start: the line, or the row of a .parquet; 0 in a .txt."""
    disk_bytes: int
    """How far reading has come since the record before."""
    raw: bytes = b""
    """The line as it stands in the file, if it came from one."""


@dataclass(frozen=True)
class Listing:
    files: list[File]
    ignored: dict[str, int]
    """Files of other kinds in the folders: how many of each suffix."""


def list_files(inputs: Sequence[Path]) -> Listing:
    """The text files among `inputs` and, however deep, inside of the folders among them, sorted.

    A `UserError` names an input that is missing, of another kind, given twice, or has no text file inside.
    """
    files: list[File] = []
    ignored: Counter[str] = Counter()
    kinds = ", ".join(SUFFIXES)
    if not inputs:
        raise UserError(f"--input: nothing given: name {kinds} files, or folders of them")
    for path in sorted(inputs, key=str):
        if path.is_dir():
            every = (Path(root, name) for root, _, names in os.walk(path) for name in names if name[0] != ".")
            inside = [p for p in every if p.is_file() or not p.exists()]  # a pipe would not end; broken links are told
            texts = sorted((p for p in inside if p.name.endswith(SUFFIXES)), key=lambda p: p.parts)
            ignored.update(p.suffix or "no suffix" for p in inside if not p.name.endswith(SUFFIXES))
            if not texts:
                raise UserError(f"{path}: no {kinds} file in this folder")
            files += (File(text, str(path)) for text in texts)
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif path.is_file() and path.name.endswith((*SUFFIXES, *NAMED)):
            files.append(File(path, str(path)))
        else:
            raise UserError(f"{path}: not a text file that megalm reads: give {kinds} files, or folders of them")
    twice = [path for path, count in Counter(os.path.realpath(file.path) for file in files).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: given twice: name each input once, and weigh sources in the training config")
    return Listing(files, dict(sorted(ignored.items())))


def make_units(files: Iterable[File], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cuts and groups `files`, in order, into units of about `unit_bytes` of text."""
    units: list[Unit] = []
    group: list[Piece] = []
    room = unit_bytes
    for file in files:
        for piece in _cut(file, unit_bytes):
            if group and piece.text_bytes > room:
                units.append(tuple(group))
                group, room = [], unit_bytes
            if group and group[-1].path == piece.path:
                group[-1] = _joined(group[-1], piece)
            else:
                group.append(piece)
            room -= piece.text_bytes
    if group:
        units.append(tuple(group))
    return units


def _cut(file: File, unit_bytes: int) -> Iterator[Piece]:
    """The pieces that a file may be cut into; there is always one."""
    path, source = file
    if path.name.endswith(".parquet"):
        from megalm.data.parquet import row_groups

        yield from (Piece(path, i, i + 1, disk, text, source) for i, (disk, text) in enumerate(row_groups(path)))
        return
    size = path.stat().st_size
    ratio = RATIO if path.name.endswith(COMPRESSED) else 1
    step = unit_bytes if is_plain_lines(path) else max(size, 1)
    for start in range(0, max(size, 1), step):
        end = min(start + step, size)
        yield Piece(path, start, end, end - start, (end - start) * ratio, source)


def is_plain_lines(path: Path) -> bool:
    """Whether the file is JSON lines that are not compressed."""
    return not path.name.endswith((*COMPRESSED, ".parquet", ".txt"))


def _joined(first: Piece, second: Piece) -> Piece:
    return first._replace(
        end=second.end,
        disk_bytes=first.disk_bytes + second.disk_bytes,
        text_bytes=first.text_bytes + second.text_bytes,
    )


def read_unit(unit: Unit, text_key: str) -> Iterator[Record]:
    """The unit's records in order; blank lines are none."""
    for piece in unit:
        name = piece.path.name
        if name.endswith(".txt"):
            yield _read_text(piece)
        elif name.endswith(".parquet"):
            yield from _read_rows(piece, text_key)
        elif name.endswith(COMPRESSED):
            yield from _read_compressed(piece, text_key)
        else:
            with piece.path.open("rb", buffering=1 << 20) as file:
                if piece.start > 0:  # the line that the byte before belongs to is the piece before's
                    file.seek(piece.start - 1)
                    file.readline()
                yield from _read_lines(file, piece, text_key, file.tell())


def where(path: Path, start: int, line: int) -> str:
    """`file:line` for messages, of a line in the piece that begins at `start`: the lines before it are counted now."""
    if line == 0:
        return str(path)
    if path.name.endswith(".parquet"):
        from megalm.data.parquet import rows_before

        return f"{path}: row {rows_before(path, start) + line}"
    if start > 0:
        with path.open("rb") as file:
            left = start
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                line += block.count(b"\n")
                left -= len(block)
            # A line that began in the piece before and ends in this one was counted there.
            file.seek(start - 1)
            line += file.read(1) != b"\n"
    return f"{path}:{line}"


def _read_text(piece: Piece) -> Record:
    content = piece.path.read_bytes()
    return Record(*_decode(content.removeprefix(BOM)), piece, 0, len(content))


def _read_rows(piece: Piece, text_key: str) -> Iterator[Record]:
    from megalm.data.parquet import read_column

    rows = done = 0
    for values, num_rows in read_column(piece.path, piece.start, piece.end, text_key):
        for content in values:
            rows += 1
            text, problem = ("", f"{text_key!r} is not a string") if content is None else _decode(content)
            disk = piece.disk_bytes * rows // num_rows  # the file does not tell how far it was read
            yield Record(text, problem, piece, rows, disk - done)
            done = disk


def _read_compressed(piece: Piece, text_key: str) -> Iterator[Record]:
    import zstandard

    is_gzip = piece.path.name.endswith(".gz")
    with piece.path.open("rb") as packed:
        file = gzip.GzipFile(fileobj=packed) if is_gzip else io.BufferedReader(_Zstandard(packed), 1 << 20)
        done = 0
        try:
            for record in _read_lines(file, piece, text_key, None):
                position = packed.tell()
                yield record._replace(disk_bytes=position - done)
                done = position
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            kind = "gzip" if is_gzip else "zstandard"
            raise UserError(f"{piece.path}: damaged {kind} file ({error}): mend it or leave it out") from None


class _Zstandard(io.RawIOBase):
    """The frames of a zstandard file, unpacked. EOFError if the last is cut short, which zstandard's own reader takes
    for the end."""

    def __init__(self, packed: BinaryIO) -> None:
        import zstandard

        self._packed = packed
        # As large a window as `zstd --long=31` makes, which large public dumps are written with.
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._pending = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._pending or self._packed.read(1 << 15)
            if not block:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._unpacker.decompressobj()
            self._ready = memoryview(self._frame.decompress(block))
            self._pending = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _read_lines(file: Iterable[bytes], piece: Piece, text_key: str, position: int | None) -> Iterator[Record]:
    """The records of the lines that start before `piece.end`, or of all if no position is given."""
    pending = 0
    for number, line in enumerate(file, start=1):
        if position is not None:
            if position >= piece.end:
                return
            position += len(line)
        pending += len(line)
        if number == 1 and piece.start == 0:
            line = line.removeprefix(BOM)
        if not line.isspace() and line:
            text, problem = _parse(line, text_key)
            yield Record(text, problem, piece, number, pending, line)
            pending = 0


def _parse(line: bytes, text_key: str) -> tuple[str, str]:
    """A line's text and "", or "" and the reason why it has none."""
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            line.decode()
        except UnicodeDecodeError:
            return "", "invalid UTF-8"
        return "", "malformed JSON"
    if not isinstance(content, dict):
        return "", "not a JSON object"
    text = content.get(text_key)
    if not isinstance(text, str):
        return "", f"{text_key!r} is not a string" if text_key in content else f"no {text_key!r} field"
    return ("", EMPTY) if not text or text.isspace() else (text, "")


def _decode(content: bytes) -> tuple[str, str]:
    """A text and "", or "" and the reason why these bytes are none."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return "", "invalid UTF-8"
    return ("", EMPTY) if not text or text.isspace() else (text, "")
