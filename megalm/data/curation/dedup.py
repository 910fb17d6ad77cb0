"""Removes documents that repeat an earlier one: `megalm data dedup`.

    1  units --workers--> a digest (and a signature) of each document's text
    2  which document repeats which, and the first of each stays                  exactly; then, if wanted, nearly
    3  units --workers--> part-K.jsonl, without what is removed

The inputs are read twice, so that no text waits in memory. Step 2 takes about 70 bytes a document, and 240 for each
that is removed; for near duplicates see `minhash`. Exact means equal text; the digest is xxh3-128, so that two of
10**12 different documents have the same with probability 10**-15.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import xxhash

from megalm.data.counts import SkipLimit
from megalm.data.curation import minhash
from megalm.data.curation.documents import read_documents
from megalm.data.curation.parts import (
    OWNED,
    Counts,
    Ledger,
    OnProgress,
    Spot,
    UnitRecords,
    new_part,
    open_units,
    place,
    save_report,
    size,
)
from megalm.data.curation.words import require_rensa
from megalm.data.directory import new_directory
from megalm.data.sources import UNIT_BYTES, Unit
from megalm.data.workers import map_in_order
from megalm.errors import UserError

KINDS = ("exact", "minhash")
BATCH_BYTES = 1 << 20  # text whose signatures are computed together; its words take ten times as much


class Duplicate(NamedTuple):
    """A removed document, and the one that is kept instead. `id` is the record's "id", if it has one."""

    document: str
    id: Any
    repeats: str
    repeats_id: Any
    similarity: float
    """1 if the texts are equal, else the estimated Jaccard similarity."""


@dataclass(frozen=True)
class DedupReport:
    """What was removed. `duplicates` lists the first of them."""

    counts: Counts
    exact: int
    near: int
    duplicates: list[Duplicate]
    faults: list[str]


def dedup(
    inputs: Sequence[Path],
    output: Path,
    *,
    kind: str = "minhash",
    threshold: float = 0.8,
    ngram: int = 5,
    listed: int = 1000,
    workers: int = 1,
    text_key: str = "text",
    limit: SkipLimit = SkipLimit(),
    overwrite: bool = False,
    unit_bytes: int = UNIT_BYTES,
    on_progress: OnProgress = lambda what, done, total: None,
) -> DedupReport:
    """Writes the documents of `inputs` that repeat no earlier one to `output`; a `UserError` says what does not fit.

    `kind` "minhash" removes equal texts too. `threshold` is of the Jaccard similarity of word `ngram`s.
    """
    _check(kind, threshold, ngram, listed, workers)
    units, total = open_units(inputs, unit_bytes)
    near_ngram = ngram if kind == "minhash" else None
    with new_directory(output, OWNED, overwrite) as directory:
        scan = _Scan(units, limit)
        with minhash.NearDuplicates(directory, threshold) if near_ngram else nullcontext() as similar:
            with closing(map_in_order(partial(_scanner, text_key, near_ngram), units, workers)) as results:
                for done in scan.take(results, similar):
                    on_progress("Reading", done, 2 * total)
            repeats = scan.repeats(similar)
        first = list(repeats)[:listed]
        wanted = np.unique(np.array([n for d in first for n in (d, repeats[d][0])], np.int64))
        tasks = scan.write_tasks(np.fromiter(repeats, np.int64, len(repeats)), wanted)
        named: dict[int, tuple[str, Any]] = {}
        with closing(map_in_order(partial(_part_writer, text_key, directory), tasks, workers)) as written:
            done = total
            for task, part in zip(tasks, written, strict=True):
                scan.finish(task, part, named)
                done += part.disk_bytes
                on_progress("Writing", done, 2 * total)
        exact = sum(of[1] is None for of in repeats.values())
        duplicates = [
            Duplicate(*named[d], *named[repeats[d][0]], 1.0 if (s := repeats[d][1]) is None else round(s, 4))
            for d in first
        ]
        report = DedupReport(scan.ledger.counts, exact, len(repeats) - exact, duplicates, scan.ledger.faults)
        settings = {
            "inputs": list(map(str, inputs)),
            "kind": kind,
            **({"threshold": threshold, "ngram": ngram} if near_ngram else {}),
        }
        save_report(directory, _to_json(report, settings))
    return report


def _check(kind: str, threshold: float, ngram: int, listed: int, workers: int) -> None:
    if kind not in KINDS:
        raise UserError(f"--kind {kind}: no such kind: choose {' or '.join(KINDS)}")
    if not 0 < threshold <= 1:
        raise UserError(f"--threshold {threshold}: a similarity above 0 and up to 1")
    for name, value, least in (("--ngram", ngram, 1), ("--list", listed, 0), ("--workers", workers, 1)):
        if value < least:
            raise UserError(f"{name} {value}: must be at least {least}")
    if kind == "minhash":
        require_rensa("--kind minhash")


def _to_json(report: DedupReport, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": "megalm-dedup",
        "version": 1,
        **settings,
        **report.counts.to_json(),
        "removed_exact": report.exact,
        "removed_near": report.near,
        "faulty_examples": report.faults,
        "duplicates_listed": len(report.duplicates),
        "duplicates": [duplicate._asdict() for duplicate in report.duplicates],
    }


@dataclass
class _Scanned:
    """A unit's documents: digests uint64[N, 2]; with signatures, those and whether they can be compared."""

    records: UnitRecords
    digests: np.ndarray
    signatures: np.ndarray
    comparable: np.ndarray


def _scanner(text_key: str, ngram: int | None) -> Callable[[Unit], _Scanned]:
    return partial(_scan_unit, text_key=text_key, ngram=ngram)


def _scan_unit(unit: Unit, text_key: str, ngram: int | None) -> _Scanned:
    records = UnitRecords()
    digests = bytearray()
    signatures = [np.zeros((0, minhash.PERMUTATIONS), np.uint32)]
    comparable = [np.zeros(0, bool)]
    texts: list[str] = []
    waiting = 0

    def sign() -> None:
        nonlocal waiting
        waiting = 0
        if ngram is not None and texts:
            signature, has_words = minhash.signatures(texts, ngram)
            signatures.append(signature)
            comparable.append(has_words)
        texts.clear()

    for document in read_documents(unit, text_key):
        if not records.saw(document):
            continue
        text = document.record.text
        content = text.encode()
        digests += xxhash.xxh3_128_digest(content)
        texts.append(text)
        waiting += len(content)
        if waiting >= BATCH_BYTES:
            sign()
    sign()
    pairs = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    return _Scanned(records, pairs, np.concatenate(signatures), np.concatenate(comparable))


class _WriteTask(NamedTuple):
    number: int
    unit: Unit
    documents: int
    removed: np.ndarray
    """Documents to leave out, counted from 0 in the unit."""
    wanted: np.ndarray
    """Documents whose places and ids are wanted."""


@dataclass
class _Written:
    counts: Counts = field(default_factory=Counts)
    disk_bytes: int = 0
    named: dict[int, tuple[Spot, Any]] = field(default_factory=dict)


class _Scan:
    """The first pass's findings, and what follows from them."""

    def __init__(self, units: list[Unit], limit: SkipLimit) -> None:
        self.ledger = Ledger(limit)
        self._units = units
        self._before: list[list[int]] = []
        self._starts = [0]
        """The number of each unit's first document, and of all documents at the end."""
        self._digests: list[np.ndarray] = []
        self._comparable: list[np.ndarray] = []

    def take(self, results: Iterator[_Scanned], similar: minhash.NearDuplicates | None) -> Iterator[int]:
        """Takes in the units in order; yields the bytes read so far."""
        done = 0
        for unit, found in zip(self._units, results, strict=True):
            self._before.append(self.ledger.add(unit, found.records))
            self._starts.append(self._starts[-1] + len(found.digests))
            self._digests.append(found.digests)
            if similar:
                similar.add(found.signatures)
                self._comparable.append(found.comparable)
            done += found.records.disk_bytes
            yield done
        self.ledger.check()

    def repeats(self, similar: minhash.NearDuplicates | None) -> dict[int, tuple[int, float | None]]:
        """For each document to remove, in order: the one that it repeats, and their similarity, None if equal."""
        first = first_equal(np.concatenate(self._digests))
        self._digests.clear()
        number = np.arange(len(first))
        equal = np.flatnonzero(first != number)
        found: dict[int, tuple[int, float | None]] = {}
        if similar:
            found |= similar.find(np.flatnonzero((first == number) & np.concatenate(self._comparable)))
        for document, other in zip(equal.tolist(), first[equal].tolist(), strict=True):
            found[document] = found.get(other, (other, None))  # what is equal to a near duplicate repeats the same
        return dict(sorted(found.items()))

    def write_tasks(self, removed: np.ndarray, wanted: np.ndarray) -> list[_WriteTask]:
        """What the second pass does with each unit; both arrays are ascending numbers of documents."""
        tasks = []
        for number, (unit, (start, end)) in enumerate(zip(self._units, pairwise(self._starts), strict=True)):
            portions = (_portion(array, start, end) for array in (removed, wanted))
            tasks.append(_WriteTask(number, unit, end - start, *portions))
        return tasks

    def finish(self, task: _WriteTask, part: _Written, named: dict[int, tuple[str, Any]]) -> None:
        """Notes what a part kept, and the names of its documents that are wanted."""
        self.ledger.counts.add(part.counts)
        for document, (spot, id_) in part.named.items():
            name = place(task.unit, self._before[task.number], spot)
            named[self._starts[task.number] + document] = name, id_


def _portion(numbers: np.ndarray, start: int, end: int) -> np.ndarray:
    """Those of the ascending `numbers` in [start, end), less start."""
    low, high = np.searchsorted(numbers, [start, end])
    return numbers[low:high] - start


def first_equal(digests: np.ndarray) -> np.ndarray:
    """int64[N]: for each row of digests, uint64[N, 2], the number of the first row that is equal to it."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal rows stay in their order
    ordered = digests[order]
    starts = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])[: len(order)]
    first = np.empty(len(order), np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def _part_writer(text_key: str, directory: Path) -> Callable[[_WriteTask], _Written]:
    return partial(_write_part, text_key=text_key, directory=directory)


def _write_part(task: _WriteTask, text_key: str, directory: Path) -> _Written:
    result = _Written()
    removed, wanted = set(task.removed.tolist()), set(task.wanted.tolist())
    number = 0
    with new_part(directory, task.number) as write:
        for document in read_documents(task.unit, text_key):
            result.disk_bytes += document.record.disk_bytes
            if document.record.problem:
                continue
            if number in wanted:
                result.named[number] = Spot(document.piece, document.number), _id(document.line)
            if number not in removed:
                write(document.line)
                result.counts.kept += 1
                result.counts.kept_bytes += size(document.record.text)
            number += 1
    if number != task.documents:
        raise UserError(f"{task.unit[0].path}: it changed while it was read: run again when nothing writes to it")
    return result


def _id(line: bytes) -> Any:
    """The record's "id", if it is plain text or a number."""
    value = orjson.loads(line).get("id")
    return value if isinstance(value, str | int | float) else None
