"""Raw text to a directory of token shards: `megalm data prepare`.

    units (64 MB of text)  --one worker each-->  shard-K.bin, shard-K.idx     (megalm.data.shards)
    all shards             --manifest.json-->    the output directory, renamed into place

No token crosses a process boundary, and unit K makes shard K whichever worker takes it, so the output does not depend
on the number of workers. Records without a text are counted by reason and left out, up to a limit. On any failure, a
worker that was killed among them, nothing is left behind.
"""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from megalm.data.directory import new_directory
from megalm.data.indexed import token_dtype
from megalm.data.manifest import Manifest, TokenizerRecord
from megalm.data.shards import EXAMPLES, Advance, Job, UnitResult, write_shard
from megalm.data.sources import EMPTY, UNIT_BYTES, Unit, list_files, make_units, where
from megalm.data.tokenizer import Tokenizer, load_tokenizer
from megalm.data.workers import run_in_workers
from megalm.errors import UserError

OWNED = re.compile(r"manifest\.json|shard-\d+\.(bin|idx)")

OnProgress = Callable[[int, int, int], None]
"""Told now and then: bytes read from disk, of how many, and tokens written."""


@dataclass(frozen=True)
class SkipLimit:
    """How many faulty records may be left out: `share` of all records, and at least `count`."""

    share: float = 0.01
    count: int = 10

    @classmethod
    def parse(cls, text: str) -> SkipLimit:
        """`100` is a count, `1%` and `0.01` are shares of the records."""
        try:
            if text.isdecimal():
                return cls(0.0, int(text))
            share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise UserError(f"--max-skipped {text}: neither a count, as in 100, nor a share, as in 1% or 0.01")
        return cls(share, 0)

    def allows(self, faulty: int, records: int) -> bool:
        return faulty <= max(self.count, self.share * records)


@dataclass(frozen=True)
class Report:
    """What was prepared. `examples` are the first faulty records, as `file:line: reason`; `ignored` are the files of
    other kinds in the inputs' folders, by suffix; `input_bytes` is the size of the inputs on disk."""

    manifest: Manifest
    records: int
    examples: list[str]
    ignored: dict[str, int]
    input_bytes: int


def prepare(
    inputs: Sequence[Path],
    tokenizer_path: str,
    output: Path,
    *,
    workers: int = 1,
    text_key: str = "text",
    limit: SkipLimit = SkipLimit(),
    overwrite: bool = False,
    unit_bytes: int = UNIT_BYTES,
    on_progress: OnProgress = lambda done, total, tokens: None,
) -> Report:
    """Tokenizes the documents of `inputs` into `output`; a `UserError` says what is wrong with what the user gave."""
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    tokenizer = load_tokenizer(tokenizer_path)
    listing = list_files(inputs)
    units = make_units(listing.files, unit_bytes)
    total = sum(piece.end - piece.start for unit in units for piece in unit)
    dtype = token_dtype(tokenizer.vocab_size).name
    done = tokens = 0

    def advance(new_bytes: int, new_tokens: int) -> None:
        nonlocal done, tokens
        done, tokens = done + new_bytes, tokens + new_tokens
        on_progress(done, total, tokens)

    try:
        with new_directory(output, OWNED, overwrite) as directory:
            job = Job(directory, text_key, dtype)
            tally = _Tally(len(units), limit)
            if min(workers, len(units)) == 1:
                results = _run_here(units, job, tokenizer, advance)
            else:
                results = run_in_workers(units, job, tokenizer_path, min(workers, len(units)), advance)
            with closing(results):
                for number, result in results:
                    tally.add(number, result)
            tally.check()
            manifest = tally.manifest(_record(tokenizer, tokenizer_path), dtype)
            manifest.save(directory)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"--output {output}: {os.strerror(error.errno)}: nothing was written: free some space"
            ) from None
        raise
    return Report(manifest, tally.records, tally.examples(), listing.ignored, total)


def _record(tokenizer: Tokenizer, path: str) -> TokenizerRecord:
    absolute = path if path == "byte" else os.path.abspath(path)
    return TokenizerRecord(absolute, tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod)


class _Tally:
    """Collects the units' results, which come in any order."""

    def __init__(self, num_units: int, limit: SkipLimit) -> None:
        self._results: list[UnitResult | None] = [None] * num_units
        self._limit = limit
        self._skipped: Counter[str] = Counter()
        self.records = 0

    def add(self, number: int, result: UnitResult) -> None:
        """Notes a unit's result; a count of faulty records is held to its limit at once, a share at the end."""
        self._results[number] = result
        self._skipped += result.skipped
        self.records += result.records
        if self._limit.share == 0:
            self._check_limit()

    def check(self) -> None:
        self._check_limit()
        if not any(result.shard for result in self._done()):
            reasons = f" ({self._reasons(self._skipped)})" if self._skipped else ""
            raise UserError(f"--input: the corpus is empty: no document in it has a text{reasons}")

    def _check_limit(self) -> None:
        faulty = Counter({reason: count for reason, count in self._skipped.items() if reason != EMPTY})
        if not self._limit.allows(faulty.total(), self.records):
            raise UserError(
                f"--input: {faulty.total()} of {self.records} records are faulty ({self._reasons(faulty)}; first "
                f"{self.examples()[0]}), more than --max-skipped allows: mend them, or raise it"
            )

    def manifest(self, tokenizer: TokenizerRecord, dtype: str) -> Manifest:
        shards = tuple(result.shard for result in self._done() if result.shard)
        return Manifest(tokenizer, dtype, dict(sorted(self._skipped.items())), shards)

    def examples(self) -> list[str]:
        found = [example for result in self._done() for example in result.examples]
        return [f"{where(piece, line)}: {reason}" for piece, line, reason in found[:EXAMPLES]]

    def _done(self) -> Iterator[UnitResult]:
        return (result for result in self._results if result)

    @staticmethod
    def _reasons(skipped: Counter[str]) -> str:
        return ", ".join(f"{reason}: {count}" for reason, count in sorted(skipped.items()))


def _run_here(
    units: list[Unit], job: Job, tokenizer: Tokenizer, advance: Advance
) -> Generator[tuple[int, UnitResult], None, None]:
    for number, unit in enumerate(units):
        yield number, write_shard(number, unit, job, tokenizer, advance)
