"""Each rule on a document that breaks it and on one that barely does not, and against a plain count of the papers'."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.data.curation.quality import (
    check_c4,
    check_fineweb,
    check_gopher_quality,
    check_gopher_repetition,
    check_length,
)
from megalm.data.curation.rules import C4, FineWeb, GopherQuality, GopherRepetition, Length

SENTENCES = (
    "The council met on Tuesday to talk about the new bridge. Most of those present were in favour of it! "
    "What would it cost, and who should pay for that? Nobody had an answer that the others could live with. "
    "So they agreed to meet again in a week, with figures from the engineers. Until then the ferry will go on."
)
GOOD = f"{SENTENCES}\n{SENTENCES[::-1]}."


def reason(breach: Any) -> str | None:
    return breach and breach.reason


@pytest.mark.parametrize("check", [check_gopher_quality, check_gopher_repetition, check_c4, check_fineweb])
def test_an_ordinary_text_breaks_no_rule(check: Any) -> None:
    rule = {"check_gopher_quality": GopherQuality, "check_gopher_repetition": GopherRepetition, "check_c4": C4}
    assert check(SENTENCES, rule.get(check.__name__, FineWeb)()) is None


@pytest.mark.parametrize(
    ("rule", "good", "bad", "broken"),
    [
        (Length(min_characters=3), "abc", "ab", "too low: characters"),
        (Length(max_characters=3), "abc", "abcd", "too high: characters"),
        (Length(min_words=3), "a b\nc", "a bcd", "too low: words"),
        (Length(max_words=3), "a b c", "a b c d", "too high: words"),
    ],
)
def test_length(rule: Length, good: str, bad: str, broken: str) -> None:
    assert check_length(good, rule) is None
    assert reason(check_length(bad, rule)) == broken


FILL = "the be to of and that have with some more words that fill this text up to its size"


def text_of(count: int, *others: str) -> str:
    words = FILL.split()
    return " ".join([*others, *(words * (count // len(words) + 1))[: count - len(others)]])


@pytest.mark.parametrize(
    ("good", "bad", "broken"),
    [
        (text_of(50), text_of(49), "too low: words"),
        (text_of(100_000), text_of(100_001), "too high: words"),
        (
            " ".join(["the", "of"] * 15 + ["abc", "abcd"] * 15),
            " ".join(["the", "of"] * 40),
            "too low: mean word length",
        ),
        (text_of(60), "the of " + " ".join(["elevenchars"] * 60), "too high: mean word length"),
        (text_of(60, *["#tag"] * 6), text_of(60, *["#tag"] * 7), "too high: hashes per word"),
        (text_of(60, *["so..."] * 3, *["so…"] * 3), text_of(60, *["so..."] * 7), "too high: ellipses per word"),
        (
            "\n".join(["- item that follows on"] * 18 + ["the words of it"] * 2),
            "\n".join(["• item that follows on"] * 19 + ["the words of it"]),
            "too high: bullet lines",
        ),
        (
            "\n".join([text_of(30)] * 7 + [text_of(30) + "..."] * 3),
            "\n".join([text_of(30)] * 6 + [text_of(30) + " …"] * 4),
            "too high: ellipsis lines",
        ),
        (text_of(100, *["1234"] * 20), text_of(100, *["1234"] * 21), "too low: alphabetic words"),
        (
            " ".join(["the", "with", *["other"] * 60]),
            " ".join(["the", "the", *["other"] * 60]),
            "too low: stop words",
        ),
    ],
)
def test_gopher_quality(good: str, bad: str, broken: str) -> None:
    assert check_gopher_quality(good, GopherQuality()) is None
    assert reason(check_gopher_quality(bad, GopherQuality())) == broken


def unlike(count: int, start: int = 0, length: int = 40) -> list[str]:
    """Pieces that have no two words in common."""
    return [
        f"piece{i}".ljust(length // 2, "x") + " " + f"rest{i}".ljust(length // 2 - 1, "y")
        for i in range(start, start + count)
    ]


@pytest.mark.parametrize(
    ("good", "bad", "broken"),
    [
        ("\n\n".join([*unlike(7, length=80), *["short"] * 4]), "\n\n".join([*unlike(6, length=80), *["short"] * 5]),
         "too high: duplicate paragraphs"),
        ("\n\n".join([*unlike(9), *unlike(2)]), "\n\n".join([*unlike(7), *unlike(3)]),
         "too high: duplicate paragraph characters"),
        ("\n".join([*unlike(7, length=80), *["short"] * 4]), "\n".join([*unlike(6, length=80), *["short"] * 5]),
         "too high: duplicate lines"),
        ("\n".join([*unlike(9), *unlike(2)]), "\n".join([*unlike(7), *unlike(3)]),
         "too high: duplicate line characters"),
    ],
)  # fmt: skip
def test_gopher_repetition_of_lines_and_paragraphs(good: str, bad: str, broken: str) -> None:
    rule = GopherRepetition(max_top_ngram={}, max_duplicate_ngrams={})
    assert check_gopher_repetition(good, rule) is None
    assert reason(check_gopher_repetition(bad, rule)) == broken


def top_share(words: list[str], text: str, n: int) -> float:
    grams = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    top = grams.most_common(1)
    return len(top[0][0]) * top[0][1] / len(text) if top else 0.0


def duplicate_share(words: list[str], text: str, n: int) -> float:
    seen: set[tuple[str, ...]] = set()
    characters = i = 0
    while i + n <= len(words):
        gram = tuple(words[i : i + n])
        if gram in seen:
            characters += sum(map(len, gram))
            i += n
        else:
            seen.add(gram)
            i += 1
    return characters / len(text)


@given(st.integers(0, 2**32), st.integers(1, 120), st.integers(1, 30))
def test_ngram_shares_are_those_of_a_plain_count(seed: int, count: int, vocabulary: int) -> None:
    rng = random.Random(seed)
    words = ["w" * rng.randrange(1, 9) + str(rng.randrange(vocabulary)) for _ in range(count)]
    text = " ".join(words)
    for n in (1, 2, 3, 4, 7):
        for share, key in ((top_share, "max_top_ngram"), (duplicate_share, "max_duplicate_ngrams")):
            true = share(words, text, n)
            rule = {"max_top_ngram": {}, "max_duplicate_ngrams": {}, "max_duplicate_lines": None}
            limits = [(true + 1e-9, False)] + ([(true - 1e-9, True)] if true > 0 else [])
            for limit, broken in limits:
                found = check_gopher_repetition(text, GopherRepetition(**{**rule, key: {n: min(limit, 1.0)}}))
                assert (found is not None) == (broken and limit < 1)


def test_gopher_repetition_tries_the_papers_ngrams() -> None:
    rng = random.Random(0)
    words = [f"w{rng.randrange(10**6)}" for _ in range(400)]
    assert check_gopher_repetition(" ".join(words), GopherRepetition()) is None
    assert reason(check_gopher_repetition(" ".join([*words, *["same thing"] * 120]), GopherRepetition())) == (
        "too high: top 2-gram"
    )
    repeated = words + words[:100]
    assert reason(check_gopher_repetition(" ".join(repeated), GopherRepetition())) == "too high: duplicate 5-grams"
    off = GopherRepetition(max_top_ngram={}, max_duplicate_ngrams={})
    assert check_gopher_repetition(" ".join(repeated), off) is None


@pytest.mark.parametrize(
    ("good", "bad", "broken"),
    [
        (SENTENCES, SENTENCES + " Lorem Ipsum dolor.", "lorem ipsum"),
        (SENTENCES, SENTENCES + " {", "curly bracket"),
        ("One two three. " * 5, "One two three. " * 4, "too low: sentences"),
        ("One two three.\n" * 5, "One two.\n" * 9, "too low: sentences"),
        ("One two three.\n" * 5, "One two three\n" * 9, "too low: sentences"),
        ("One two three.\n" * 5, "One two three...\n" * 9, "too low: sentences"),
        ("One two three!\n" * 5, "Turn on JavaScript now.\n" * 9, "too low: sentences"),
        ('He said "no way."\n' * 5, "Version 1.2.3 is out in 3.5 of 7.\n" * 4, "too low: sentences"),
    ],
)
def test_c4(good: str, bad: str, broken: str) -> None:
    assert check_c4(good, C4()) is None
    assert reason(check_c4(bad, C4())) == broken


LINE = "a line of more than thirty characters"


@pytest.mark.parametrize(
    ("good", "bad", "broken"),
    [
        (
            "\n".join([LINE + "1.", *[f"{LINE} {i}" for i in range(7)]]),
            "\n".join([LINE + "1.", *[f"{LINE} {i}" for i in range(8)]]),
            "too low: punctuated lines",
        ),
        (
            "\n".join([*[f"{LINE} {i:2}." for i in range(19)], LINE + "  0.", LINE + "  0."]),
            "\n".join([*[f"{LINE} {i:2}." for i in range(8)], LINE + "  0."]),
            "too high: duplicate line characters",
        ),
        (
            "\n".join([*[f"{LINE} {i}." for i in range(33)], *[f"short {i}." for i in range(67)]]),
            "\n".join([*[f"{LINE} {i}." for i in range(32)], *[f"short {i}." for i in range(68)]]),
            "too high: short lines",
        ),
    ],
)
def test_fineweb(good: str, bad: str, broken: str) -> None:
    assert check_fineweb(good, FineWeb()) is None
    assert reason(check_fineweb(bad, FineWeb())) == broken


@pytest.mark.parametrize("text", ["", " ", "\n\n", "x", "。"])
def test_texts_of_next_to_nothing_are_judged_without_an_error(text: str) -> None:
    for check, rule in (
        (check_gopher_quality, GopherQuality(min_words=0)),
        (check_gopher_repetition, GopherRepetition()),
        (check_c4, C4(min_sentences=None)),
        (check_fineweb, FineWeb()),
        (check_length, Length(min_words=0)),
    ):
        check(text, rule)  # type: ignore[operator]


def test_a_check_that_is_null_is_off() -> None:
    fields = dict.fromkeys(GopherQuality.model_fields)
    assert check_gopher_quality("# # #", GopherQuality(**fields)) is None
    assert (
        check_fineweb(
            "x\nx\nx", FineWeb(min_punctuated_lines=None, max_duplicate_line_characters=None, max_short_lines=None)
        )
        is None
    )
