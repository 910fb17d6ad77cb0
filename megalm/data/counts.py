"""What preparation counts: documents, bytes, tokens and what was left out, a source (an input that the user named)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megalm.data.sources import EMPTY


@dataclass
class Counts:
    """Counts of one source. `tokens` counts the end-of-document tokens; `skipped` is by reason."""

    records: int = 0
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def faulty(self) -> Counter[str]:
        """What was skipped and is not just empty."""
        return Counter({reason: count for reason, count in self.skipped.items() if reason != EMPTY})

    def add(self, other: Counts) -> None:
        self.records += other.records
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        self.tokens += other.tokens
        self.skipped += other.skipped

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("records", "documents", "text_bytes", "tokens")}
        return {**fields, "skipped": dict(sorted(self.skipped.items()))}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Counts:
        return cls(**{**content, "skipped": Counter(content["skipped"])})


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
