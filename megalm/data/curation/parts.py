"""What dedup and filter have in common: units in, part files of a new directory out, and what was counted.

    unit K  ->  part-K.jsonl     the records that are kept, in order        (no file where none is)
                report.json      what was removed and why

A record is named by its file and its number among the file's records, from 1: in a .jsonl without blank lines that is
the line, in a .parquet the row.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megalm.data.counts import Seen, SkipLimit, refuse_empty
from megalm.data.curation.documents import Document
from megalm.data.sources import EMPTY, Unit, list_files, make_units
from megalm.files import write_atomic

OWNED = re.compile(r"report\.json|part-\d+\.jsonl")
EXAMPLES = 3  # places that are kept of each fault and of each rule

OnProgress = Callable[[str, int, int], None]
"""Told now and then: what is being done, bytes read from disk, of how many."""


class Spot(NamedTuple):
    """A record's place in its unit: the number of the piece, from 0, and of the record in it, from 1."""

    piece: int
    number: int


@dataclass
class Counts(Seen):
    """What was seen in one unit, or in all of them, and how much of it is kept."""

    kept: int = 0
    kept_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """What the report holds of it."""
        removed = {"removed": self.documents - self.kept, "removed_bytes": self.text_bytes - self.kept_bytes}
        return super().to_json() | removed


@dataclass
class UnitRecords:
    """What reading a unit found: counts, records of each piece, and the first faulty ones."""

    counts: Counts = field(default_factory=Counts)
    disk_bytes: int = 0
    piece_records: Counter[int] = field(default_factory=Counter)
    faults: list[tuple[Spot, str]] = field(default_factory=list)

    def saw(self, document: Document) -> bool:
        """Counts a record; whether it has a text."""
        record = document.record
        self.counts.records += 1
        self.disk_bytes += record.disk_bytes
        self.piece_records[document.piece] += 1
        if record.problem:
            self.counts.skipped[record.problem] += 1
            if record.problem != EMPTY and len(self.faults) < EXAMPLES:
                self.faults.append((Spot(document.piece, document.number), record.problem))
            return False
        self.counts.documents += 1
        self.counts.text_bytes += size(record.text)
        return True


def size(text: str) -> int:
    """Bytes of `text` as UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


class Ledger:
    """Adds up what the units found, in their order, and knows what the records are called."""

    def __init__(self, limit: SkipLimit) -> None:
        self.counts = Counts()
        self.faults: list[str] = []
        self._limit = limit
        self._last: tuple[Path | None, int] = (None, 0)

    def add(self, unit: Unit, found: UnitRecords) -> list[int]:
        """Notes the next unit; gives for each of its pieces the number of records before it in its file."""
        before = []
        for i, piece in enumerate(unit):
            path, records = self._last
            before.append(records if path == piece.path else 0)
            self._last = piece.path, before[-1] + found.piece_records[i]
        self.counts.add(found.counts)
        for spot, reason in found.faults[: EXAMPLES - len(self.faults)]:
            self.faults.append(f"{place(unit, before, spot)}: {reason}")
        return before

    def check(self) -> None:
        """A `UserError` if more records are faulty than the limit allows, or none has a text."""
        self._limit.check(self.counts, lambda: self.faults)
        refuse_empty(self.counts, self.counts.documents)


def place(unit: Unit, before: Sequence[int], spot: Spot) -> str:
    """The name of a record; see the module."""
    path = unit[spot.piece].path
    return str(path) if path.name.endswith(".txt") else f"{path}:{before[spot.piece] + spot.number}"


def open_units(inputs: Sequence[Path], unit_bytes: int) -> tuple[list[Unit], int]:
    """The inputs' units, and their size on the disk in bytes."""
    units = make_units(list_files(inputs).files, unit_bytes)
    return units, sum(path.stat().st_size for path in {piece.path for unit in units for piece in unit})


@contextmanager
def new_part(directory: Path, number: int) -> Iterator[Callable[[bytes], None]]:
    """Yields a function that writes a record to part `number`; the file is made with the first."""
    path = directory / f"part-{number:05d}.jsonl"
    file: BinaryIO | None = None

    def write(line: bytes) -> None:
        nonlocal file
        if file is None:
            file = path.open("wb", buffering=1 << 20)
        file.write(line)
        file.write(b"\n")

    try:
        yield write
        if file:
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None:  # a write names no file
            error.filename = str(path)
        raise
    finally:
        if file:
            file.close()


def save_report(directory: Path, content: dict[str, Any]) -> None:
    """Writes `report.json`."""
    write_atomic(directory / "report.json", (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
