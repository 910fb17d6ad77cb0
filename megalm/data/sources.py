"""Streams documents out of text files.

    inputs (files and folders)  -> list_files ->  .jsonl, .jsonl.gz and .txt files, sorted
    files                       -> make_units ->  units of about 64 MB: what one worker takes at a time
    a unit                      -> read_unit  ->  records: a document's text, or the reason why there is none

A .jsonl file has a JSON object a line, its text under one key; a large one is cut into byte ranges, and a line belongs
to the range that its first byte lies in. A .txt file is one document. Small files share a unit; a .gz file is read
from its beginning and never cut. What a unit holds follows from the files alone.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import orjson

from megalm.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")
UNIT_BYTES = 64 << 20
GZIP_RATIO = 4  # text is about this many times larger than its .gz
BOM = b"\xef\xbb\xbf"
EMPTY = "empty"


class Piece(NamedTuple):
    """A file's bytes [start, end); the whole file unless it is a .jsonl."""

    path: Path
    start: int
    end: int


Unit = tuple[Piece, ...]


class Record(NamedTuple):
    """A document, or a place where one should be. `problem` is "" if there is a text, else why it is left out."""

    text: str
    problem: str
    piece: Piece
    line: int
    """From 1 at the piece's start; 0 in a .txt."""
    disk_bytes: int
    """How far reading has come since the record before."""
    raw: bytes = b""
    """The line as it stands in the file, if it came from one."""


@dataclass(frozen=True)
class Listing:
    files: list[Path]
    ignored: dict[str, int]
    """Files of other kinds in the folders: how many of each suffix."""


def list_files(inputs: Sequence[Path]) -> Listing:
    """The text files among `inputs` and, however deep, inside of the folders among them, sorted.

    A `UserError` names an input that is missing, of another kind, given twice, or has no text file inside.
    """
    files: list[Path] = []
    ignored: Counter[str] = Counter()
    kinds = ", ".join(SUFFIXES)
    if not inputs:
        raise UserError(f"--input: nothing given: name {kinds} files, or folders of them")
    for path in sorted(inputs, key=str):
        if path.is_dir():
            inside = [Path(root, name) for root, _, names in os.walk(path) for name in names if name[0] != "."]
            texts = sorted((p for p in inside if p.name.endswith(SUFFIXES)), key=lambda p: p.parts)
            ignored.update(p.suffix or "no suffix" for p in inside if not p.name.endswith(SUFFIXES))
            if not texts:
                raise UserError(f"{path}: no {kinds} file in this folder")
            files += texts
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif path.name.endswith(SUFFIXES):
            files.append(path)
        else:
            raise UserError(f"{path}: not a text file that megalm reads: give {kinds} files, or folders of them")
    twice = [path for path, count in Counter(Path(os.path.realpath(p)) for p in files).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: given twice: name each input once, and weigh sources in the training config")
    return Listing(files, dict(sorted(ignored.items())))


def make_units(files: Iterable[Path], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cuts and groups `files`, in order, into units of about `unit_bytes` of text."""
    units: list[Unit] = []
    group: list[Piece] = []
    room = unit_bytes
    for path in files:
        size = path.stat().st_size
        is_lines = path.name.endswith(".jsonl")
        step = unit_bytes if is_lines else max(size, 1)
        for start in range(0, max(size, 1), step):
            piece = Piece(path, start, min(start + step, size))
            text_bytes = (piece.end - piece.start) * (GZIP_RATIO if path.name.endswith(".gz") else 1)
            if group and text_bytes > room:
                units.append(tuple(group))
                group, room = [], unit_bytes
            group.append(piece)
            room -= text_bytes
    if group:
        units.append(tuple(group))
    return units


def read_unit(unit: Unit, text_key: str) -> Iterator[Record]:
    """The unit's records in order; blank lines are none."""
    for piece in unit:
        if piece.path.name.endswith(".txt"):
            yield _read_text(piece)
        elif piece.path.name.endswith(".gz"):
            yield from _read_gzip(piece, text_key)
        else:
            with piece.path.open("rb", buffering=1 << 20) as file:
                if piece.start > 0:  # the line that the byte before belongs to is the piece before's
                    file.seek(piece.start - 1)
                    file.readline()
                yield from _read_lines(file, piece, text_key, file.tell())


def where(piece: Piece, line: int) -> str:
    """`file:line` for messages; in a later piece of a file, the lines before it are counted now."""
    if line == 0:
        return str(piece.path)
    if piece.start > 0:
        with piece.path.open("rb") as file:
            left = piece.start
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                line += block.count(b"\n")
                left -= len(block)
            # A line that began in the piece before and ends in this one was counted there.
            file.seek(piece.start - 1)
            line += file.read(1) != b"\n"
    return f"{piece.path}:{line}"


def _read_text(piece: Piece) -> Record:
    content = piece.path.read_bytes()
    try:
        text, problem = content.removeprefix(BOM).decode(), ""
    except UnicodeDecodeError:
        text, problem = "", "invalid UTF-8"
    if not problem and (not text or text.isspace()):
        text, problem = "", EMPTY
    return Record(text, problem, piece, 0, len(content))


def _read_gzip(piece: Piece, text_key: str) -> Iterator[Record]:
    with piece.path.open("rb") as packed, gzip.open(packed) as file:
        done = 0
        try:
            for record in _read_lines(file, piece, text_key, None):
                position = packed.tell()
                yield record._replace(disk_bytes=position - done)
                done = position
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{piece.path}: damaged gzip file ({error}): mend it or leave it out") from None


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
    if not text or text.isspace():
        return "", EMPTY
    return text, ""
