from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megalm.data.fim import FillInTheMiddle

EOD, P, M, S = 0, 101, 102, 103
NAMES = ["code", "docs"]


def applied(rows: np.ndarray, ranks: list[int], rate: float = 1.0, spm_rate: float = 0.5, seed: int = 7) -> np.ndarray:
    result = rows.copy()
    fim = FillInTheMiddle(rate, spm_rate, P, M, S)
    fim.apply(result, np.zeros(len(rows), np.int64), np.array(ranks), NAMES, seed, EOD)
    return result


def split(row: list[int]) -> list[list[int]]:
    """The documents between ends."""
    documents: list[list[int]] = [[]]
    for token in row:
        if token == EOD:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


def restored(document: list[int]) -> list[int]:
    """The text that a rearranged document is about."""
    if P not in document:
        return document
    suffix_mark, middle_mark = document.index(S), document.index(M)
    assert document[0] == P
    if suffix_mark == 1:
        return document[middle_mark + 1 :] + document[2:middle_mark]
    prefix, suffix = document[1:suffix_mark], document[suffix_mark + 1 : middle_mark]
    return prefix + document[middle_mark + 1 :] + suffix


rows = st.integers(1, 60).flatmap(
    lambda length: st.lists(st.lists(st.integers(0, 9), min_size=length, max_size=length), min_size=1, max_size=5)
)


@given(rows=rows, rate=st.sampled_from([0.0, 0.5, 1.0]), spm_rate=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0))
def test_each_document_keeps_its_place_and_its_text_but_for_three_tokens_at_its_end(
    rows: list[list[int]], rate: float, spm_rate: float, seed: int
) -> None:
    before = np.array(rows)
    after = applied(before, list(range(len(rows))), rate, spm_rate, seed)
    assert np.array_equal(after == EOD, before == EOD)
    for old, new in zip(before.tolist(), after.tolist(), strict=True):
        for was, now in zip(split(old), split(new), strict=True):
            text = restored(now)
            assert text == was[: len(text)]
            assert len(was) - len(text) == (3 if P in now else 0)
            assert not (rate == 0 and P in now)
            if P in now:
                assert (now[1] == S) == (spm_rate == 1) or spm_rate == 0.5 or now[1] == S  # an empty prefix looks alike


def test_the_draws_are_of_the_seed_and_the_sample_alone() -> None:
    rows = np.arange(1, 61)[None].repeat(6, axis=0)
    whole = applied(rows, [3, 9, 4, 3, 0, 7])
    assert np.array_equal(whole[0], whole[3])
    assert len({tuple(row) for row in whole.tolist()}) == 5
    assert np.array_equal(np.concatenate([applied(rows[:2], [3, 9]), applied(rows[:4], [4, 3, 0, 7])]), whole)
    other = rows[:1].copy()
    FillInTheMiddle(1.0, 0.5, P, M, S).apply(other, np.array([1]), np.array([3]), NAMES, 7, EOD)
    assert not np.array_equal(other[0], whole[0]), "another source"
    assert not np.array_equal(applied(rows[:1], [3], seed=8)[0], whole[0])


def test_the_rates_are_kept() -> None:
    rows = np.arange(1, 61)[None].repeat(4000, axis=0)
    after = applied(rows, list(range(4000)), rate=0.4, spm_rate=0.25)
    changed = (after == P).any(axis=1)
    # With 60 tokens, the last 4 places of the second cut leave a document as it is: 1 - (57 / 61)**2 of them.
    assert abs(changed.mean() - 0.4 * (57 / 61) ** 2) < 0.03
    spm = after[changed, 1] == S
    empty_prefix = 1 - (60 / 61) ** 2
    assert abs(spm.mean() - (0.25 + 0.75 * empty_prefix)) < 0.04
