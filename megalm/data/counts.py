"""What is counted of text: records, documents, bytes and what was left out, and how much may be left out; when it is
prepared, tokens, too, a source (an input that the user named)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

from megalm.data.sources import EMPTY
from megalm.errors import UserError


@dataclass
class Seen:
    """Counts of records; `documents` have a text, `skipped` are those without one, by reason."""

    records: int = 0
    documents: int = 0
    text_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def faulty(self) -> Counter[str]:
        """What was skipped and is not just empty."""
        return Counter({reason: count for reason, count in self.skipped.items() if reason != EMPTY})

    def add(self, other: Self) -> None:
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))

    def to_json(self) -> dict[str, Any]:
        numbers = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "skipped"}
        return numbers | {"skipped": dict(sorted(self.skipped.items()))}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        return cls(**{**content, "skipped": Counter(content["skipped"])})


@dataclass
class Counts(Seen):
    """Counts of one source; `tokens` counts the end-of-document tokens."""

    tokens: int = 0


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

    def check(self, seen: Seen, faults: Callable[[], Sequence[str]]) -> None:
        """A `UserError` if more records are faulty than this allows; `faults` gives the places of the first ones."""
        faulty = seen.faulty
        if not self.allows(faulty.total(), seen.records):
            raise UserError(
                f"--input: {faulty.total()} of {seen.records} records are faulty ({reasons(faulty)}; first "
                f"{faults()[0]}), more than --max-skipped allows: mend them, or raise it"
            )


def refuse_empty(seen: Seen, documents: int) -> None:
    """A `UserError` if there are no `documents` in the input."""
    if documents == 0:
        reason = f" ({reasons(seen.skipped)})" if seen.skipped else ""
        raise UserError(f"--input: the corpus is empty: no document in it has a text{reason}")


class Fault(NamedTuple):
    """Where a faulty record lies: a piece's file, start and end, the record's number in it, and what is wrong."""

    path: str
    start: int
    end: int
    line: int
    reason: str


def total(counts: Iterable[Counts]) -> Counts:
    whole = Counts()
    for part in counts:
        whole.add(part)
    return whole


def reasons(skipped: Counter[str]) -> str:
    """`reason: count` of each, for messages."""
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(skipped.items()))
