"""Finds text of evaluation sets in documents: a run of words that both have.

    evaluation files --every text in every record--> examples --n-grams of words--> sorted hashes
    document --n-grams of words--> is one of them there?

See `rules.Decontaminate` for the numbers and their source, `words` for what a word is: case, punctuation and line ends
make no difference. Hashes have 64 bits, so that a document of a thousand words is taken for one that has one of a
million n-grams with probability 10**-10. Evaluation files are read into memory, documents are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from megalm.data.curation.documents import is_parquet, read_documents, read_rows
from megalm.data.curation.rules import Breach, Decontaminate
from megalm.data.curation.words import gram_hashes, require_rensa, words
from megalm.data.sources import EMPTY, Piece, list_files, make_units
from megalm.errors import UserError

TEXT = "text"  # the key that a .txt's text gets; those of others do not matter


class _Grams(NamedTuple):
    """The examples' n-grams of one length: hashes in ascending order, and the number of the place of each."""

    hashes: np.ndarray
    places: np.ndarray


class Contamination:
    """The n-grams of the evaluation files of `rule`. `examples` are looked for; `short` ones have too few words."""

    def __init__(self, rule: Decontaminate) -> None:
        require_rensa("--decontaminate")
        self.examples = self.short = 0
        self._places: list[tuple[str, str]] = []
        """Of the examples: file, and record."""
        found: dict[int, list[tuple[np.ndarray, int]]] = {}
        for place, text in _examples([Path(name) for name in rule.files]):
            tokens = words(text)
            if len(tokens) < min(rule.min_words, rule.ngram):
                self.short += 1
                continue
            self.examples += 1
            if not self._places or self._places[-1] != place:
                self._places.append(place)
            n = min(rule.ngram, len(tokens))
            found.setdefault(n, []).append((gram_hashes(tokens, n), len(self._places) - 1))
        if not self.examples:
            raise UserError(
                f"--decontaminate {rule.files[0]}: no text of at least {min(rule.min_words, rule.ngram)} words in it: "
                "nothing could be found"
            )
        self._grams = {n: _sorted(pairs) for n, pairs in sorted(found.items())}

    def check(self, text: str) -> Breach | None:
        """The first run of words that is in an evaluation file too."""
        tokens = words(text)
        for n, (known, places) in self._grams.items():
            grams = gram_hashes(tokens, n)
            at = np.searchsorted(known, grams)
            hits = np.flatnonzero(known[np.minimum(at, len(known) - 1)] == grams)
            if len(hits):
                first = int(hits[0])
                path, place = self._places[places[at[first]]]
                return Breach(path, f"{n} words of {place}: {' '.join(tokens[first : first + n])}")
        return None


def _sorted(pairs: list[tuple[np.ndarray, int]]) -> _Grams:
    hashes = np.concatenate([grams for grams, _ in pairs])
    places = np.repeat([place for _, place in pairs], [len(grams) for grams, _ in pairs])
    hashes, first = np.unique(hashes, return_index=True)
    return _Grams(hashes, places[first])


def _examples(files: list[Path]) -> Iterator[tuple[tuple[str, str], str]]:
    """Each text in the records of `files`, with the file and the record's place."""
    for unit in make_units(list_files(files).files, unit_bytes=1 << 62):  # no file is cut
        for piece in unit:
            for number, line in _records(piece):
                place = f"{piece.path}:{number}" if number else str(piece.path)
                try:
                    content = orjson.loads(line)
                except orjson.JSONDecodeError:
                    raise UserError(f"{place}: malformed JSON: mend it or leave it out of --decontaminate") from None
                for text in _texts(content):
                    yield (str(piece.path), place), text


def _records(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """The records of a file as JSON, whatever their keys, and their numbers from 1; 0 for a .txt."""
    if is_parquet(piece):
        yield from enumerate(read_rows(piece, TEXT), start=1)
        return
    for document in read_documents((piece,), TEXT):
        record = document.record
        if document.line:
            yield document.number if record.line else 0, document.line
        elif record.problem != EMPTY:
            raise UserError(f"{piece.path}: {record.problem}: mend it or leave it out of --decontaminate")


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
