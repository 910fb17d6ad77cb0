from __future__ import annotations

import math

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from megalm.data.order import ROUNDS, Permutation, derive_key

MASK = 2**64 - 1
keys = st.integers(0, MASK)


def slow_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_permute(size: int, key: int, index: int, inverse: bool = False) -> int:
    """The permutation in plain integers, in either direction."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    rounds = [slow_mix((key + r * 0x9E3779B97F4A7C15) & MASK) for r in range(1, ROUNDS + 1)]
    while True:
        left, right = index >> half, index % 2**half
        for round_key in reversed(rounds) if inverse else rounds:
            if inverse:
                left, right = right ^ (slow_mix(left ^ round_key) % 2**half), left
            else:
                left, right = right, left ^ (slow_mix(right ^ round_key) % 2**half)
        index = left << half | right
        if index < size:
            return index


@given(size=st.integers(1, 3000), key=keys)
def test_a_permutation_of_any_small_size_reaches_every_value_once(size: int, key: int) -> None:
    assert np.array_equal(np.sort(Permutation(size, key)(np.arange(size))), np.arange(size))


@pytest.mark.parametrize("size", range(1, 70))
def test_a_permutation_of_each_of_the_smallest_sizes_reaches_every_value_once(size: int) -> None:
    assert np.array_equal(np.sort(Permutation(size, 5)(np.arange(size))), np.arange(size))


@given(size=st.integers(1, 2**52) | st.integers(0, 52).map(lambda e: 2**e + 1), key=keys, data=st.data())
def test_a_permutation_equals_the_network_in_plain_integers_and_can_be_undone(
    size: int, key: int, data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, size - 1))
    value = int(Permutation(size, key)(index))
    assert value == slow_permute(size, key, index)
    assert slow_permute(size, key, value, inverse=True) == index


@pytest.mark.parametrize("size", [2**62, 2**62 - 1, 2**60 + 1, 2**54 + 1, 2**53 + 1])
def test_a_permutation_of_the_largest_sizes_stays_in_range_without_collisions(size: int) -> None:
    ends = np.concatenate([np.arange(2000), size - 1 - np.arange(2000)])
    values = Permutation(size, 11)(ends)
    assert values.min() >= 0
    assert values.max() < size
    assert len(np.unique(values)) == len(ends)


@given(
    cases=st.lists(
        st.tuples(st.integers(1, 10**6), keys).flatmap(
            lambda c: st.tuples(st.just(c[0]), st.just(c[1]), st.integers(0, c[0] - 1))
        ),
        min_size=1,
        max_size=30,
    )
)
def test_each_element_may_have_a_size_and_a_key_of_its_own(cases: list[tuple[int, int, int]]) -> None:
    sizes, own_keys, indices = zip(*cases, strict=True)
    values = Permutation(np.array(sizes), np.array(own_keys, np.uint64))(np.array(indices))
    assert values.tolist() == [int(Permutation(size, key)(index)) for size, key, index in cases]


def test_different_keys_give_different_orders() -> None:
    orders = {tuple(Permutation(50, key)(np.arange(50)).tolist()) for key in range(500)}
    assert len(orders) == 500


@pytest.mark.parametrize("size", [5, 6, 17, 64])
def test_over_many_keys_each_pair_of_values_is_about_equally_frequent(size: int) -> None:
    trials = 40_000
    some_keys = np.random.default_rng(0).integers(0, 2**64, trials, dtype=np.uint64)
    first, last = Permutation(size, some_keys)(0), Permutation(size, some_keys)(size - 1)
    seen = np.bincount(first * size + last, minlength=size * size).reshape(size, size)
    assert (np.diag(seen) == 0).all()
    expected = trials / (size * (size - 1))
    chi_squared = ((seen - expected) ** 2 / expected)[~np.eye(size, dtype=bool)].sum()
    freedom = size * (size - 1) - 1
    assert abs(chi_squared - freedom) < 6 * math.sqrt(2 * freedom)


def test_any_stretch_of_the_order_is_spread_evenly_over_the_whole() -> None:
    size, stretch, parts = 1_000_003, 64_000, 64
    for key in (1, 2, 3):
        values = Permutation(size, key)(500_000 + np.arange(stretch))
        seen = np.bincount(values * parts // size, minlength=parts)
        chi_squared = ((seen - stretch / parts) ** 2 / (stretch / parts)).sum()
        assert chi_squared < parts - 1 + 6 * math.sqrt(2 * (parts - 1))
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02


def test_an_index_outside_of_the_range_is_refused() -> None:
    for index in (-1, 10):
        with pytest.raises(IndexError):
            Permutation(10, 1)(index)
    with pytest.raises(ValueError, match="size"):
        Permutation(0, 1)


def test_a_key_is_the_documented_hash_and_differs_in_each_of_its_parts() -> None:
    assert derive_key("window", 7, "code", 3) == xxhash.xxh3_64_intdigest(b'["window",7,"code",3]')
    parts = [("window", 7, "code", 3), ("phase", 7, "code", 3), ("window", 8, "code", 3), ("window", 7, "docs", 3)]
    assert len({derive_key(*part) for part in [*parts, ("window", 7, "code", 4)]}) == 5
