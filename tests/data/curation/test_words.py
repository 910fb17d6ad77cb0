"""Words, and hashes of their n-grams."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.data.curation.words import gram_hashes, words


def test_case_punctuation_line_ends_and_compatible_forms_make_no_difference() -> None:
    assert words("The QUICK,\n  brown--fox…") == words("the quick brown fox") == ["the", "quick", "brown", "fox"]
    assert words("ﬁne Straße ｆｕｌｌ") == ["fine", "strasse", "full"]
    assert words("a_b 3,5") == ["a_b", "3", "5"]
    assert words(" \n…!?") == []


def test_scripts_without_spaces_give_a_word_a_character() -> None:
    assert words("新しい本です。") == list("新しい本です")
    assert words("Python编程") == ["python", "编", "程"]
    assert words("Это новая 새 책") == ["это", "новая", "새", "책"]


@given(st.lists(st.sampled_from("abcdefg"), max_size=60), st.integers(1, 8))
def test_grams_have_equal_hashes_exactly_where_their_words_are_equal(tokens: list[str], n: int) -> None:
    hashes = gram_hashes(tokens, n).tolist()
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    assert len(hashes) == len(grams)
    assert len(set(hashes)) == len(set(grams)) == len(set(zip(hashes, grams, strict=True)))


def test_hashes_are_the_same_in_every_process() -> None:
    code = "from megalm.data.curation.words import *; print(gram_hashes('a bc déf g'.split(), 2).tolist())"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout == f"{gram_hashes(['a', 'bc', 'déf', 'g'], 2).tolist()}\n"


@pytest.mark.parametrize("length", [1, 8, 9, 40])
def test_no_two_of_many_grams_share_a_hash(length: int) -> None:
    tokens = [str(i).rjust(length, "x") for i in np.random.default_rng(length).integers(0, 1000, 100_000)]
    assert len(set(gram_hashes(tokens, 3).tolist())) == len(set(zip(tokens, tokens[1:], tokens[2:], strict=False)))
