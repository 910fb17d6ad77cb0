"""The words of a text, and hashes of its n-grams: what near duplicates and contamination are measured in.

A word is a run of letters, digits and underscores, after Unicode's compatibility folding (NFKC) and without case, so
line ends, punctuation and capitals make no difference. Scripts that do not set spaces between words (Chinese,
Japanese, Thai, Lao, Burmese, Khmer) give a word a character.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np

from megalm.errors import UserError

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing


def words(text: str) -> list[str]:
    """The words of `text` in order."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def require_rensa(what: str) -> None:
    """A `UserError` that says how to install what hashes words, if it is not there."""
    try:
        import rensa  # noqa: F401
    except ImportError:
        raise UserError(f"{what}: needs the package rensa: install it with `pip install 'megalm[curation]'`") from None


def gram_hashes(tokens: list[str], n: int) -> np.ndarray:
    """uint64[max(0, len(tokens) - n + 1)]: a hash of each run of `n` words; the same in every process."""
    from rensa import RMinHash

    count = len(tokens) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    hashes = _mix(np.array(RMinHash.hash_token_sets([tokens])[0], np.uint64))
    grams = np.zeros(count, np.uint64)
    for i in range(n):
        grams = grams * MULTIPLIER + hashes[i : i + count]
    return _mix(grams)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every input bit changes every output bit half of the time."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
