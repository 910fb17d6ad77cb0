"""Near duplicates: MinHash signatures of word n-grams, and locality-sensitive hashing over them.

    text --words--> n-grams --hashes--> signature of PERMUTATIONS values      equal in a place with probability J
    signature --cut into bands of r values--> buckets                         documents in one bucket are compared

J is the Jaccard similarity of the two sets of n-grams. It is estimated by the share of equal values, with a standard
error of sqrt(J (1 - J) / 128), at most 0.044. Of pairs at the threshold t, 1 - (1 - t**r)**(128 // r) share a bucket;
`rows_per_band` takes the largest r with which that is RECALL.

In memory: about 70 bytes a document, and 550 for each that shares a bucket with another. On disk while it runs: 512
bytes a document, and 8 a band.

Sources: Broder (1997), "On the resemblance and containment of documents"; Lee et al. (2022), "Deduplicating training
data makes language models better", arXiv:2107.06499 (5-grams, 0.8). Signatures are computed by rensa.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np

from megalm.data.curation.words import gram_hashes, words

PERMUTATIONS = 128
SEED = 1
RECALL = 0.97


def rows_per_band(threshold: float) -> int:
    """The largest number of values a band with which pairs at the threshold are found with probability RECALL."""
    fits = (r for r in range(PERMUTATIONS, 1, -1) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= RECALL)
    return next(fits, 1)


def signatures(texts: Sequence[str], ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """uint32[N, PERMUTATIONS], and bool[N]: whether a text has a word, so that there is something to compare.

    A text of fewer than `ngram` words counts as one n-gram.
    """
    from rensa import RMinHash

    tokens = [words(text) for text in texts]
    grams = [gram_hashes(found, min(ngram, len(found))) if found else np.zeros(0, np.uint64) for found in tokens]
    ends = np.cumsum([0, *map(len, grams)]).astype(np.uint64)
    flat = np.concatenate(grams) if grams else np.zeros(0, np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, PERMUTATIONS, SEED)
    signature = np.array(matrix.to_rows(), np.uint32).reshape(len(texts), PERMUTATIONS)
    return signature, np.array([bool(found) for found in tokens], bool)


class NearDuplicates:
    """Takes in all signatures, in the order of the documents, then says which document repeats which.

    The signatures lie in nameless files in `directory`, which vanish when this context ends.
    """

    def __init__(self, directory: Path, threshold: float) -> None:
        self._threshold = threshold
        self._rows = rows_per_band(threshold)
        self._bands = PERMUTATIONS // self._rows
        self._open = ExitStack()
        self._files: list[IO[bytes]] = []
        for _ in range(self._bands + 1):
            file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  (`_open` closes it)
            self._files.append(self._open.enter_context(file))
        self._count = 0

    def __enter__(self) -> NearDuplicates:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, signature: np.ndarray) -> None:
        """The next documents' signatures, uint32[N, PERMUTATIONS]."""
        self._files[-1].write(np.ascontiguousarray(signature).tobytes())
        for band in range(self._bands):
            hashes = np.zeros(len(signature), np.uint64)
            for column in signature[:, band * self._rows : (band + 1) * self._rows].T:
                hashes = (hashes ^ column) * np.uint64(0x9E3779B97F4A7C15)
                hashes ^= hashes >> np.uint64(32)
            self._files[band].write(hashes.tobytes())
        self._count += len(signature)

    def find(self, candidates: np.ndarray) -> dict[int, tuple[int, float]]:
        """For each of `candidates` (int64, ascending) that repeats an earlier one: the document that it repeats and
        their similarity.

        In order, a document is removed if its similarity to one that is kept reaches the threshold; the most similar is
        named. So whatever is removed is similar to something that stays, and nothing is removed for the sake of a
        document that is removed itself.
        """
        documents, buckets = self._shared_buckets(candidates)
        if not len(documents):
            return {}
        matrix = np.memmap(self._files[-1], np.uint32, "r", shape=(self._count, PERMUTATIONS))
        kept: defaultdict[int, list[int]] = defaultdict(list)
        found = {}
        starts = np.flatnonzero(np.diff(documents, prepend=-1))
        for document, own in zip(documents[starts].tolist(), np.split(buckets, starts[1:]), strict=True):
            rivals = sorted({rival for bucket in own.tolist() for rival in kept.get(bucket, ())})
            if rivals:
                similarity = (matrix[rivals] == matrix[document]).mean(axis=1)
                best = int(similarity.argmax())
                if similarity[best] >= self._threshold:
                    found[document] = rivals[best], float(similarity[best])
                    continue
            for bucket in own.tolist():
                kept[bucket].append(document)
        return found

    def _shared_buckets(self, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of a document and a bucket that it shares with others, sorted by document: int64 and int64."""
        documents, buckets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        first_free = 0
        for file in self._files[: self._bands]:
            file.flush()
            if self._count == 0:
                break
            hashes = np.memmap(file, np.uint64, "r", shape=(self._count,))[candidates]
            order = np.argsort(hashes, kind="stable")
            starts = np.diff(hashes[order], prepend=~hashes[order[:1]]) != 0
            bucket = np.cumsum(starts) - 1
            shared = np.bincount(bucket)[bucket] > 1
            documents.append(candidates[order[shared]])
            buckets.append(bucket[shared] + first_free)
            first_free += len(candidates)
        self._files[-1].flush()
        pairs = np.concatenate(documents), np.concatenate(buckets)
        by_document = np.argsort(pairs[0], kind="stable")
        return pairs[0][by_document], pairs[1][by_document]
