from __future__ import annotations

import numpy as np
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from megalm.data.trace import first_hash, rolled

samples = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 2**40)), max_size=30)


def columns(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    array = np.array(rows, np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


@given(samples=samples, cut=st.integers(0, 30))
def test_the_hash_is_the_documented_chain_however_it_is_cut_into_batches(
    samples: list[tuple[int, int]], cut: int
) -> None:
    start = first_hash("f00d")
    digest = xxhash.xxh3_128(b"f00d").digest()
    for source, rank in samples:
        digest = xxhash.xxh3_128(digest + source.to_bytes(8, "little") + rank.to_bytes(8, "little")).digest()
    assert rolled(start, *columns(samples)) == digest.hex()
    assert rolled(rolled(start, *columns(samples[:cut])), *columns(samples[cut:])) == digest.hex()


def test_another_sample_another_order_or_other_data_give_another_hash() -> None:
    usual = [(0, 5), (1, 7), (0, 6)]
    others = [[(0, 5), (1, 7)], [(0, 5), (0, 6), (1, 7)], [(0, 5), (1, 8), (0, 6)], [(5, 0), (1, 7), (0, 6)]]
    hashes = {rolled(first_hash("f00d"), *columns(rows)) for rows in [usual, *others]}
    hashes.add(rolled(first_hash("cafe"), *columns(usual)))
    assert len(hashes) == 6
