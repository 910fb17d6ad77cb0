"""Rules on a document's words and lines: length, Gopher's quality and repetition, C4's, FineWeb's.

Each is a function of the text that gives the first breach, or None. Words are what white space separates, so scripts
without spaces need other rules. The numbers and their papers are in `rules`. Where a paper leaves a detail open, the
reading is that of datatrove, which FineWeb was made with: a duplicate is a repetition that is not the first, and the
n-grams that are counted do not overlap.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from megalm.data.curation.rules import C4, Breach, FineWeb, GopherQuality, GopherRepetition, Length

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLETS = ("•", "-", "*", "‣", "·")
ELLIPSES = ("...", "…")
TERMINAL = (".", "!", "?", '"', "'", "”", "’", "。", "！", "？", "…", "»", "।", "؟")
PARAGRAPHS = re.compile(r"\n{2,}")
LINES = re.compile(r"\n+")
SENTENCE_END = re.compile(r"[.!?]+[\"')\]”’]*(?=\s|$)|[。！？।]+")


def check_length(text: str, rule: Length) -> Breach | None:
    count = len(text.split())
    return (
        _below("characters", len(text), rule.min_characters)
        or _above("characters", len(text), rule.max_characters)
        or _below("words", count, rule.min_words)
        or _above("words", count, rule.max_words)
    )


def check_gopher_quality(text: str, rule: GopherQuality) -> Breach | None:
    words = text.split()
    count = len(words)
    lines = text.splitlines()
    if problem := _below("words", count, rule.min_words) or _above("words", count, rule.max_words):
        return problem
    if count == 0:
        return None
    mean = sum(map(len, words)) / count
    bullets = sum(line.lstrip().startswith(BULLETS) for line in lines) / len(lines)
    trailing = sum(line.rstrip().endswith(ELLIPSES) for line in lines) / len(lines)
    alphabetic = sum(any(map(str.isalpha, word)) for word in words) / count
    ellipses = text.count("...") + text.count("…")
    return (
        _below("mean word length", mean, rule.min_mean_word_length)
        or _above("mean word length", mean, rule.max_mean_word_length)
        or _above("hashes per word", text.count("#") / count, rule.max_hashes_per_word)
        or _above("ellipses per word", ellipses / count, rule.max_ellipses_per_word)
        or _above("bullet lines", bullets, rule.max_bullet_lines)
        or _above("ellipsis lines", trailing, rule.max_ellipsis_lines)
        or _below("alphabetic words", alphabetic, rule.min_alphabetic_words)
        or _below("stop words", len(STOP_WORDS.intersection(words)), rule.min_stop_words)
    )


def check_gopher_repetition(text: str, rule: GopherRepetition) -> Breach | None:
    if not text:
        return None
    paragraphs = PARAGRAPHS.split(text.strip())
    share, characters = _duplicates(paragraphs)
    if problem := _above("duplicate paragraphs", share, rule.max_duplicate_paragraphs) or _above(
        "duplicate paragraph characters", characters / len(text), rule.max_duplicate_paragraph_characters
    ):
        return problem
    share, characters = _duplicates(LINES.split(text))
    if problem := _above("duplicate lines", share, rule.max_duplicate_lines) or _above(
        "duplicate line characters", characters / len(text), rule.max_duplicate_line_characters
    ):
        return problem
    grams = _Grams(text.split())
    problem = None
    for n in sorted({*rule.max_top_ngram, *rule.max_duplicate_ngrams}):
        grams.lengthen(n)
        if n in rule.max_top_ngram:
            problem = _above(f"top {n}-gram", grams.top() / len(text), rule.max_top_ngram[n])
        if not problem and n in rule.max_duplicate_ngrams:
            problem = _above(f"duplicate {n}-grams", grams.duplicates() / len(text), rule.max_duplicate_ngrams[n])
        if problem:
            return problem
    return None


def check_c4(text: str, rule: C4) -> Breach | None:
    folded = text.lower()
    if rule.lorem_ipsum and "lorem ipsum" in folded:
        return Breach("lorem ipsum", "in its text")
    if rule.curly_bracket and "{" in text:
        return Breach("curly bracket", "in its text")
    if rule.min_sentences is None:
        return None
    lines = [line.strip() for line in text.splitlines()]
    counted = (
        len(SENTENCE_END.findall(line))
        for line in lines
        if line.endswith(TERMINAL)
        and not line.endswith(ELLIPSES)
        and len(line.split()) >= rule.min_line_words
        and "javascript" not in line.lower()
    )
    return _below("sentences", sum(counted), rule.min_sentences)


def check_fineweb(text: str, rule: FineWeb) -> Breach | None:
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return None
    punctuated = sum(line.rstrip().endswith(TERMINAL) for line in lines) / len(lines)
    short = sum(len(line) < rule.short_line for line in lines) / len(lines)
    characters = _duplicates(lines)[1] / sum(map(len, lines))
    return (
        _below("punctuated lines", punctuated, rule.min_punctuated_lines)
        or _above("duplicate line characters", characters, rule.max_duplicate_line_characters)
        or _above("short lines", short, rule.max_short_lines)
    )


def _below(what: str, value: float, least: float | None) -> Breach | None:
    return (
        Breach(f"too low: {what}", f"{value:.3g}, at least {least:g}") if least is not None and value < least else None
    )


def _above(what: str, value: float, most: float | None) -> Breach | None:
    return Breach(f"too high: {what}", f"{value:.3g}, at most {most:g}") if most is not None and value > most else None


def _duplicates(pieces: Iterable[str]) -> tuple[float, int]:
    """The share of pieces that repeat an earlier one, and their characters."""
    seen: set[str] = set()
    count = repeated = characters = 0
    for piece in pieces:
        count += 1
        if piece in seen:
            repeated += 1
            characters += len(piece)
        seen.add(piece)
    return repeated / max(count, 1), characters


class _Grams:
    """The n-grams of a list of words, for growing n: a number for each place, equal where the n-grams are equal."""

    def __init__(self, words: list[str]) -> None:
        known: dict[str, int] = {}
        self._words = np.array([known.setdefault(word, len(known)) for word in words], np.int64)
        self._ends = np.cumsum([0, *map(len, words)])
        self._known = len(known)
        self._n = 1
        self._ids = self._words

    def lengthen(self, n: int) -> None:
        """Goes on to `n`, which is not below the one before."""
        while self._n < n:
            pairs = self._ids[:-1] * self._known + self._words[self._n :]  # below 2**63: both are below 2**31
            self._ids = np.unique(pairs, return_inverse=True)[1]
            self._n += 1

    def top(self) -> int:
        """Characters in all places of the most frequent n-gram, with a space between its words; 0 without n-grams."""
        if not len(self._ids):
            return 0
        counts = np.bincount(self._ids)
        first = int(np.argmax(counts[self._ids] == counts.max()))
        return int(counts.max()) * (int(self._ends[first + self._n] - self._ends[first]) + self._n - 1)

    def duplicates(self) -> int:
        """Characters, without spaces, of n-grams that repeat an earlier one, going on after each that does."""
        ids, n = self._ids, self._n
        if not len(ids) or int(ids.max()) + 1 == len(ids):  # all are different
            return 0
        sizes = (self._ends[n:] - self._ends[:-n]).tolist()
        places = ids.tolist()
        seen: set[int] = set()
        characters = place = 0
        while place < len(places):
            if places[place] in seen:
                characters += sizes[place]
                place += n
            else:
                seen.add(places[place])
                place += 1
        return characters
