"""Removes documents by rules: `megalm data filter`.

    unit --worker--> each document: the first rule that it breaks, or kept --> part-K.jsonl, counts, examples

The inputs are read once, a record at a time. What the rules are is in `rules`, in the order in which they are tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megalm.data.counts import SkipLimit
from megalm.data.curation import quality
from megalm.data.curation.decontaminate import Contamination
from megalm.data.curation.documents import read_documents
from megalm.data.curation.language import LanguageCheck
from megalm.data.curation.parts import (
    EXAMPLES,
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
from megalm.data.curation.rules import Breach, Rules
from megalm.data.directory import new_directory
from megalm.data.sources import UNIT_BYTES, Unit
from megalm.data.workers import map_in_order
from megalm.errors import UserError

EXCERPT = 200  # characters of a removed document that the report shows
PLAIN: dict[str, Callable[[str, Any], Breach | None]] = {
    "length": quality.check_length,
    "gopher_quality": quality.check_gopher_quality,
    "c4": quality.check_c4,
    "fineweb": quality.check_fineweb,
    "gopher_repetition": quality.check_gopher_repetition,
}


class Removed(NamedTuple):
    """An example of what a rule removed: where it is, why, and its first characters."""

    document: str
    why: str
    text: str


@dataclass
class RuleReport:
    """What one rule removed. `reasons` counts what was wrong; `examples` are the first."""

    documents: int = 0
    text_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[Removed] = field(default_factory=list)


@dataclass(frozen=True)
class FilterReport:
    """What was removed, by rule, in the order in which rules are tried; `faults` are the first faulty records."""

    counts: Counts
    rules: dict[str, RuleReport]
    faults: list[str]


class Checker:
    """All rules that are given, with what they need in memory."""

    def __init__(self, rules: Rules) -> None:
        self._checks: list[tuple[str, Callable[[str], Breach | None]]] = []
        for name in Rules.model_fields:
            rule = getattr(rules, name)
            if rule is None:
                continue
            if name == "decontaminate":
                self._checks.append((name, Contamination(rule).check))
            elif name == "language":
                self._checks.append((name, LanguageCheck(rule).check))
            else:
                self._checks.append((name, _bound(PLAIN[name], rule)))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self._checks]

    def check(self, text: str) -> tuple[str, Breach] | None:
        """The first rule that a document breaks, and how."""
        for name, check in self._checks:
            if breach := check(text):
                return name, breach
        return None


def _bound(check: Callable[[str, Any], Breach | None], rule: Any) -> Callable[[str], Breach | None]:
    return lambda text: check(text, rule)


def filter_documents(
    inputs: Sequence[Path],
    output: Path,
    rules: Rules,
    *,
    workers: int = 1,
    text_key: str = "text",
    limit: SkipLimit = SkipLimit(),
    overwrite: bool = False,
    unit_bytes: int = UNIT_BYTES,
    on_progress: OnProgress = lambda what, done, total: None,
) -> FilterReport:
    """Writes the documents of `inputs` that break none of `rules` to `output`; a `UserError` says what does not fit."""
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    names = Checker(rules).names  # here, so that what is wrong with a rule is said before anything is read
    units, total = open_units(inputs, unit_bytes)
    ledger = Ledger(limit)
    found: dict[str, RuleReport] = {name: RuleReport() for name in names}
    with new_directory(output, OWNED, overwrite) as directory:
        make = partial(_Filterer, rules, text_key, directory)
        with closing(map_in_order(make, list(enumerate(units)), workers)) as results:
            done = 0
            for unit, result in zip(units, results, strict=True):
                before = ledger.add(unit, result.records)
                for name, rule in result.removed.items():
                    found[name].documents += rule.documents
                    found[name].text_bytes += rule.text_bytes
                    found[name].reasons += rule.reasons
                for name, spot, why, text in result.examples:
                    if len(found[name].examples) < EXAMPLES:
                        found[name].examples.append(Removed(place(unit, before, spot), why, text))
                done += result.records.disk_bytes
                on_progress("Filtering", done, total)
        ledger.check()
        report = FilterReport(ledger.counts, found, ledger.faults)
        save_report(directory, _to_json(report, inputs, rules))
    return report


@dataclass
class _Filtered:
    """What filtering a unit found. `examples` are rule, place, reason and first characters; in `removed` are none."""

    records: UnitRecords = field(default_factory=UnitRecords)
    removed: dict[str, RuleReport] = field(default_factory=dict)
    examples: list[tuple[str, Spot, str, str]] = field(default_factory=list)


class _Filterer:
    """Filters units, in a worker."""

    def __init__(self, rules: Rules, text_key: str, directory: Path) -> None:
        self._checker = Checker(rules)
        self._text_key, self._directory = text_key, directory

    def __call__(self, task: tuple[int, Unit]) -> _Filtered:
        number, unit = task
        result = _Filtered()
        counts = result.records.counts
        with new_part(self._directory, number) as write:
            for document in read_documents(unit, self._text_key):
                if not result.records.saw(document):
                    continue
                text = document.record.text
                broken = self._checker.check(text)
                if broken is None:
                    write(document.line)
                    counts.kept += 1
                    counts.kept_bytes += size(text)
                    continue
                name, breach = broken
                rule = result.removed.setdefault(name, RuleReport())
                rule.documents += 1
                rule.text_bytes += size(text)
                rule.reasons[breach.reason] += 1
                if rule.documents <= EXAMPLES:
                    spot = Spot(document.piece, document.number)
                    result.examples.append((name, spot, f"{breach.reason}: {breach.detail}", text[:EXCERPT]))
        return result


def _to_json(report: FilterReport, inputs: Sequence[Path], rules: Rules) -> dict[str, Any]:
    by_rule = {
        name: {
            "documents": rule.documents,
            "text_bytes": rule.text_bytes,
            "reasons": dict(rule.reasons.most_common()),
            "examples": [example._asdict() for example in rule.examples],
        }
        for name, rule in report.rules.items()
    }
    return {
        "format": "megalm-filter",
        "version": 1,
        "inputs": list(map(str, inputs)),
        "rules": rules.model_dump(mode="json", exclude_none=True),
        **report.counts.to_json(),
        "removed_by_rule": by_rule,
        "faulty_examples": report.faults,
    }
