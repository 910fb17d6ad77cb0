"""Raw text to a directory of token shards: `megalm data prepare`.

    units (64 MB of text)  --one worker each-->  shard-K.bin, shard-K.idx, units/K.json   (megalm.data.shards, .work)
    all units              --manifest.json-->    the output directory, renamed into place

No token crosses a process boundary, and unit K makes shard K whichever worker, command or machine takes it, so the
output does not depend on how many there are. Records without a text are counted by reason and left out, up to a limit.
The output is there whole or not at all. What is finished when a preparation is interrupted or fails stays in the work
directory, and the next one with the same inputs and settings does the rest.
"""

from __future__ import annotations

import errno
import json
import os
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from megalm.data.counts import Counts, SkipLimit, refuse_empty, total
from megalm.data.engine import choose_engine, open_engine
from megalm.data.indexed import token_dtype
from megalm.data.manifest import NAME, Manifest, TokenizerRecord
from megalm.data.shards import EXAMPLES, Job, UnitResult, write_shard
from megalm.data.share import Share
from megalm.data.sources import UNIT_BYTES, Unit, list_files, make_units, read_unit, where
from megalm.data.tokenizer import Tokenizer, load_tokenizer
from megalm.data.work import PREPARATION, WorkDirectory, files_of
from megalm.data.workers import run_in_workers
from megalm.errors import UserError
from megalm.files import write_atomic
from megalm.locks import lock

VERSION = 2  # of what a unit is made to; raise it when the same inputs and settings give other shards
PROBE_BYTES = 1 << 18  # of the first documents, on which engines are compared
PROBE_RECORDS = 1000
MAX_UNITS = 1 << 14  # of a corpus above a terabyte, larger ones are made


class Progress(NamedTuple):
    """Bytes read from disk and tokens written so far, and of how many bytes; `done_before` were done by an earlier or
    another command."""

    done: int
    total: int
    tokens: int
    done_before: int


@dataclass(frozen=True)
class Settings:
    """What the shards follow from, beside the inputs and the tokenizer. `append_eod` ends each document."""

    text_key: str = "text"
    append_eod: bool = True
    shuffle: bool = True
    unit_bytes: int = UNIT_BYTES


@dataclass(frozen=True)
class Report:
    """What was prepared. `manifest` is None while units of other ranks are missing; `units_done` of `units` are there.

    `sources` counts by input; `examples` are the first faulty records, as `file:line: reason`; `ignored` are the files
    of other kinds in the inputs' folders, by suffix; `input_bytes` is the size on disk of what this command was to
    read, and `done_before` of it were not read again. `engine` encoded, if there was anything to encode.
    """

    manifest: Manifest | None
    sources: dict[str, Counts]
    examples: list[str]
    ignored: dict[str, int]
    units: int
    units_done: int
    input_bytes: int
    done_before: int
    engine: str


def prepare(
    inputs: Sequence[Path],
    tokenizer: str | Tokenizer,
    output: Path,
    settings: Settings = Settings(),
    *,
    workers: int = 1,
    limit: SkipLimit = SkipLimit(),
    overwrite: bool = False,
    engine: str = "auto",
    share: Share = Share(),
    on_progress: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Tokenizes the documents of `inputs` into `output`; a `UserError` says what is wrong with what the user gave.

    `tokenizer` is one, or the path of one. With a `share`, only that part of the units is done; the command that finds
    all of them done writes the manifest. `say` is told in a line what the user may want to know meanwhile.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    path = tokenizer if isinstance(tokenizer, str) else ""
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    listing = list_files(inputs)
    size = sum(file.path.stat().st_size for file in listing.files)
    units = make_units(listing.files, max(settings.unit_bytes, size // MAX_UNITS))
    keys = _unit_keys(units, tokenizer, settings)
    work = WorkDirectory(output, keys, _checksum(keys), share)
    run = _Run(units, tokenizer, path, settings, work, limit, share, on_progress)
    try:
        with work.opened(overwrite) as is_done:
            run.is_under_way = True
            if not is_done:
                run.do_units(workers, engine, say)
                is_done = run.finish()
            if is_done:
                return run.report(listing.ignored, Manifest.load(work.output), work.preparation())
            return run.report(listing.ignored, None, None)
    except UserError as error:
        raise UserError(f"{error}{run.kept()}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = f"--output {output}: {os.strerror(error.errno)}: free some space"
            raise UserError(f"{reason}{run.kept()}") from None
        raise


class _Run:
    """One command's part of a preparation, between the opening of its work directory and the end."""

    def __init__(
        self,
        units: list[Unit],
        tokenizer: Tokenizer,
        tokenizer_path: str,
        settings: Settings,
        work: WorkDirectory,
        limit: SkipLimit,
        share: Share,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._units = units
        self._tokenizer = tokenizer
        self._tokenizer_path = tokenizer_path
        self._work = work
        self._limit = limit
        self._on_progress = on_progress
        self._mine = [number for number in range(len(units)) if share.has(number)]
        self._total = sum(map(self._disk_bytes, self._mine))
        self._done = self._done_before = self._tokens = 0
        self._engine = ""
        self.is_under_way = False
        dtype = token_dtype(tokenizer.vocab_size).name
        eod = tokenizer.eod if settings.append_eod else None
        self._job = Job(work.data, settings.text_key, dtype, eod, settings.shuffle)

    def do_units(self, workers: int, engine: str, say: Callable[[str], None]) -> None:
        """Does what is missing of this command's units, and notes each one that is done."""
        tally = _Tally(self._limit, self._work.results())
        missing = [(number, self._units[number]) for number in self._mine if number not in tally.results]
        self._done = self._done_before = self._total - sum(self._disk_bytes(number) for number, _ in missing)
        self._advance(0, 0)
        if not missing:
            return
        first = _first_documents((unit for _, unit in missing), self._job.text_key)
        self._engine = choose_engine(engine, self._tokenizer, first, say)
        if min(workers, len(missing)) == 1:
            results = self._do_here(missing)
        else:
            worker = _Worker(self._job, self._tokenizer, self._engine, self._work.use_lock)
            tasks = ((number, (number, unit)) for number, unit in missing)
            results = run_in_workers(worker, tasks, min(workers, len(missing)), self._advance)
        with closing(results):
            for number, result in results:
                self._work.keep(number, result)
                tally.add(number, result)

    def _do_here(self, units: Iterable[tuple[int, Unit]]) -> Generator[tuple[int, UnitResult], None, None]:
        encoder = open_engine(self._engine, self._tokenizer)
        for number, unit in units:
            yield number, write_shard(number, unit, self._job, encoder, self._advance)

    def finish(self) -> bool:
        """Makes the output, if all units are done; whether it is there."""
        with self._work.ending() as is_done:
            if is_done:
                return True
            results = self._work.results()
            if len(results) < len(self._units):
                return False
            tally = _Tally(self._limit, results)
            tally.check()
            data = self._work.data
            content = {"plan": self._work.plan, "sources": tally.sources(), "examples": tally.examples()}
            write_atomic(data / PREPARATION, (json.dumps(content, indent=2) + "\n").encode())
            record = _record(self._tokenizer, self._tokenizer_path)
            tally.manifest(record, self._job.dtype).save(data)
            self._work.publish({PREPARATION, NAME, *(name for result in results.values() for name in files_of(result))})
            return True

    def report(self, ignored: dict[str, int], manifest: Manifest | None, preparation: dict[str, Any] | None) -> Report:
        if manifest is not None and preparation is not None:
            sources = {source: Counts.from_json(counts) for source, counts in preparation["sources"].items()}
            examples, units_done = preparation["examples"], len(self._units)
        else:
            tally = _Tally(self._limit, self._work.results())
            sources = {source: Counts.from_json(counts) for source, counts in tally.sources().items()}
            examples, units_done = tally.examples(), len(tally.results)
        return Report(
            manifest=manifest,
            sources=sources,
            examples=examples,
            ignored=ignored,
            units=len(self._units),
            units_done=units_done,
            input_bytes=self._total,
            done_before=self._done_before if self._engine else self._total,
            engine=self._engine,
        )

    def kept(self) -> str:
        """What a message of failure adds."""
        done = self._work.results() if self.is_under_way else {}
        if not any(result.shard for result in done.values()):
            return ""
        kept = f"{len(done)} of {len(self._units)} units are kept in {self._work.root}"
        return f" ({kept}: the same command, run again, goes on there)"

    def _advance(self, new_bytes: int, new_tokens: int) -> None:
        self._done += new_bytes
        self._tokens += new_tokens
        self._on_progress(Progress(self._done, self._total, self._tokens, self._done_before))

    def _disk_bytes(self, number: int) -> int:
        return sum(piece.disk_bytes for piece in self._units[number])


@dataclass(frozen=True)
class _Worker:
    """Does units in a process of its own. While it lives it shares `use_lock`, so that nobody takes its files for
    leftovers."""

    job: Job
    tokenizer: Tokenizer
    engine: str
    use_lock: Path

    def __call__(self) -> Callable[[tuple[int, Unit], Callable[..., None]], UnitResult]:
        if lock(self.use_lock, shared=True, wait=False) is None:
            raise UserError("the command was killed, and another is starting")  # nobody is there to read it
        encoder = open_engine(self.engine, self.tokenizer)

        def do(task: tuple[int, Unit], advance: Callable[..., None]) -> UnitResult:
            return write_shard(*task, self.job, encoder, advance)

        return do


def _first_documents(units: Iterable[Unit], text_key: str) -> list[bytes]:
    """Documents to compare engines on."""
    found: list[bytes] = []
    size = 0
    for unit in units:
        for record in islice(read_unit(unit, text_key), PROBE_RECORDS):
            content = record.text.encode()
            if not record.problem and len(content) <= PROBE_BYTES:
                found.append(content)
                size += len(content)
            if size >= PROBE_BYTES:
                return found
        if found:
            break
    return found


def _unit_keys(units: Sequence[Unit], tokenizer: Tokenizer, settings: Settings) -> list[str]:
    """A checksum a unit of all that its shard follows from."""
    about = [VERSION, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod]
    about += [settings.text_key, settings.append_eod, settings.shuffle]
    keys = []
    for number, unit in enumerate(units):
        pieces = []
        for piece in unit:
            status = piece.path.stat()
            path = os.path.abspath(piece.path)
            pieces.append([path, status.st_size, status.st_mtime_ns, piece.start, piece.end, piece.source])
        keys.append(_checksum([*about, number, pieces]))
    return keys


def _checksum(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, separators=(",", ":")).encode())


def _record(tokenizer: Tokenizer, path: str) -> TokenizerRecord:
    absolute = os.path.abspath(path) if path not in ("", "byte") else path
    absolute = os.fsencode(absolute).decode(errors="backslashreplace")  # a name need not be UTF-8; JSON is
    return TokenizerRecord(absolute, tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod)


class _Tally:
    """Units' results, by number, and what follows from them."""

    def __init__(self, limit: SkipLimit, results: Mapping[int, UnitResult]) -> None:
        self.results: dict[int, UnitResult] = {}
        self._limit = limit
        self._whole = Counts()
        for number, result in results.items():
            self.add(number, result)

    def add(self, number: int, result: UnitResult) -> None:
        """Notes a result; a count of faulty records is held to its limit at once, a share of them in `check`."""
        self.results[number] = result
        self._whole.add(total(result.counts.values()))
        if self._limit.share == 0:
            self._limit.check(self._whole, self.examples)

    def check(self) -> None:
        self._limit.check(self._whole, self.examples)
        refuse_empty(self._whole, sum(result.shard is not None for result in self.results.values()))

    def manifest(self, tokenizer: TokenizerRecord, dtype: str) -> Manifest:
        shards = tuple(result.shard for result in self._in_order() if result.shard)
        return Manifest(tokenizer, dtype, dict(sorted(self._whole.skipped.items())), shards)

    def sources(self) -> dict[str, Any]:
        """Counts by source, as JSON."""
        found: dict[str, Counts] = defaultdict(Counts)
        for result in self._in_order():
            for source, counts in result.counts.items():
                found[source].add(counts)
        return {source: counts.to_json() for source, counts in sorted(found.items())}

    def examples(self) -> list[str]:
        faults = islice((fault for result in self._in_order() for fault in result.faults), EXAMPLES)
        return [f"{where(Path(fault.path), fault.start, fault.line)}: {fault.reason}" for fault in faults]

    def _in_order(self) -> list[UnitResult]:
        return [self.results[number] for number in sorted(self.results)]
