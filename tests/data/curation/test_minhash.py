"""Near duplicates against the Jaccard similarity that is counted here, n-gram by n-gram."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from megalm.data.curation import minhash


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    tokens = text.split()
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def changed(text: str, count: int, rng: random.Random) -> str:
    tokens = text.split()
    for place in rng.sample(range(len(tokens)), count):
        tokens[place] = f"new{rng.random()}".replace(".", "")
    return " ".join(tokens)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Texts, most of them changed versions of some that came before, at all similarities."""
    rng = random.Random(5)
    found = [" ".join(f"word{rng.randrange(3000)}" for _ in range(150)) for _ in range(150)]
    for _ in range(450):
        found.append(changed(rng.choice(found), rng.randrange(0, 12), rng))
    return found


@pytest.fixture(scope="module")
def jaccard(texts: list[str]) -> np.ndarray:
    """The similarity of each pair of `texts`."""
    sets = [grams(text, 5) for text in texts]
    common = np.array([[len(a & b) for b in sets] for a in sets])
    return common / (common.diagonal()[:, None] + common.diagonal() - common)


def test_signatures_estimate_the_jaccard_similarity(texts: list[str], jaccard: np.ndarray) -> None:
    signatures, has_words = minhash.signatures(texts, 5)
    assert has_words.all()
    assert signatures.shape == (len(texts), minhash.PERMUTATIONS)
    errors = []
    for i, j in zip(*np.nonzero(np.triu(jaccard, 1) > 0.05), strict=True):
        true, estimate = jaccard[i, j], (signatures[i] == signatures[j]).mean()
        if true == 1:
            assert estimate == 1
        else:
            errors.append((estimate - true) / (true * (1 - true) / minhash.PERMUTATIONS) ** 0.5)
    assert len(errors) > 300
    assert abs(np.mean(errors)) < 0.5
    assert np.std(errors) < 1.5


def find(texts: list[str], threshold: float, directory: Path) -> dict[int, tuple[int, float]]:
    signatures, _ = minhash.signatures(texts, 5)
    with minhash.NearDuplicates(directory, threshold) as similar:
        for block in np.array_split(signatures, 7):
            similar.add(block)
        assert not list(directory.iterdir()), "its files have no names"
        return similar.find(np.arange(len(texts)))


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_what_is_removed_is_what_brute_force_removes_but_for_pairs_near_the_threshold(
    texts: list[str], jaccard: np.ndarray, threshold: float, tmp_path: Path
) -> None:
    found = find(texts, threshold, tmp_path)
    margin = 0.15  # about four standard errors
    kept: list[int] = []
    sure_finds = sure_keeps = 0
    for i in range(len(texts)):
        best = max(jaccard[i, kept], default=0.0)
        if best >= threshold + min(margin, (1 - threshold) * 0.8):
            assert i in found, f"similarity {best} is found"
            sure_finds += 1
        elif best < threshold - margin:
            assert i not in found, f"similarity {best} is none"
            sure_keeps += 1
        if i in found:
            other, similarity = found[i]
            assert other in kept, "what is named is kept"
            assert abs(jaccard[i, other] - similarity) < margin
        else:
            kept.append(i)
    assert sure_finds > 30
    assert sure_keeps > 100


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_pairs_at_the_threshold_share_a_band_with_the_promised_probability(threshold: float) -> None:
    rows = minhash.rows_per_band(threshold)
    bands = minhash.PERMUTATIONS // rows
    rng = np.random.default_rng(0)
    equal = rng.random((4000, bands, rows)) < threshold
    recall = equal.all(axis=2).any(axis=1).mean()
    assert recall >= min(minhash.RECALL, 1 - (1 - threshold) ** minhash.PERMUTATIONS) - 0.015


def test_only_candidates_are_compared(tmp_path: Path) -> None:
    signatures, _ = minhash.signatures(["a b c d e f g"] * 4, 5)
    with minhash.NearDuplicates(tmp_path, 0.8) as similar:
        similar.add(signatures)
        assert similar.find(np.array([1, 3])) == {3: (1, 1.0)}
    with minhash.NearDuplicates(tmp_path, 0.8) as nothing:
        assert nothing.find(np.zeros(0, np.int64)) == {}


def test_short_texts_are_one_gram_and_texts_without_words_are_not_compared() -> None:
    signatures, has_words = minhash.signatures(["one two", "One, two!", "two one", "?!", "…"], 5)
    assert has_words.tolist() == [True, True, True, False, False]
    assert (signatures[0] == signatures[1]).all()
    assert (signatures[0] != signatures[2]).mean() > 0.9
