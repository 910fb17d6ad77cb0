from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.order import MAX_PERIOD, ROUNDS, Blend, Order, Permutation, derive_key
from megalm.errors import UserError

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


def farthest_from_share(blend: Blend, samples: int) -> Fraction:
    """Largest |samples of a source - its share * i| over all sources and all prefixes, in exact arithmetic."""
    source, _ = blend.locate(np.arange(samples))
    prefix = np.arange(1, samples + 1)
    worst = 0
    for number, count in enumerate(blend.counts):
        drawn = np.cumsum(source == number)
        worst = max(worst, int(np.abs(drawn * blend.period - count * prefix).max()))
    return Fraction(worst, blend.period)


weights = st.lists(st.integers(1, 40) | st.sampled_from([0.5, 0.125, 2.5]), min_size=1, max_size=24)


@given(weights=weights)
def test_every_prefix_of_the_blend_is_within_one_sample_of_every_weight(weights: list[float]) -> None:
    blend = Blend(weights)
    total = sum(map(Fraction, weights))
    assert [Fraction(count, blend.period) for count in blend.counts] == [Fraction(w) / total for w in weights]
    assert farthest_from_share(blend, 3 * blend.period + 1) < 1


@settings(max_examples=8)
@given(weights=st.lists(st.floats(1e-4, 1, allow_subnormal=False), min_size=2, max_size=12))
def test_the_bound_holds_for_weights_without_a_common_denominator_too(weights: list[float]) -> None:
    blend = Blend(weights)
    shares = np.array(weights) / sum(weights)
    assert np.abs(np.array(blend.counts) / blend.period - shares).max() < 1 / MAX_PERIOD
    assert farthest_from_share(blend, blend.period) < 1


@pytest.mark.parametrize(
    "weights",
    [
        [1] * 150,
        [1.0 / (rank + 1) for rank in range(120)],
        [*[1] * 100, 5000],
        [*[0.001] * 100, 0.9],
        [1, MAX_PERIOD - 1],
        [1, 1, MAX_PERIOD - 2],
        [0.5, 0.5 - 1e-5, 1e-5],
        np.random.default_rng(0).dirichlet([0.5] * 110).clip(1e-5).tolist(),
    ],
    ids=["equal", "harmonic", "one-heavy", "one-heavy-decimal", "extreme", "extreme-three", "rare", "dirichlet"],
)
def test_the_bound_holds_for_many_sources_and_extreme_weights(weights: list[float]) -> None:
    blend = Blend(weights)
    assert min(blend.counts) >= 1
    assert farthest_from_share(blend, blend.period) < 1


def test_decimal_weights_are_met_exactly_for_ever() -> None:
    blend = Blend([0.7, 0.2, 0.1])
    assert blend.counts == [7, 2, 1]
    _, rank = blend.locate(10 * 10**14 + np.arange(10))
    assert sorted(rank.tolist()) == sorted([*range(7 * 10**14, 7 * 10**14 + 7), 2 * 10**14, 2 * 10**14 + 1, 10**14])


def test_few_sources_with_odd_weights_stay_within_one_sample_for_a_billion_samples() -> None:
    weights = [math.sqrt(2), math.pi]
    blend = Blend(weights)
    start = 10**9
    source, rank = blend.locate(start + np.arange(1000))
    for number in (0, 1):
        share = weights[number] / sum(weights)
        mine = source == number
        assert np.abs(rank[mine] - share * (start + np.flatnonzero(mine))).max() < 1.1


@given(weights=weights, start=st.integers(0, 10**6), count=st.integers(1, 500))
def test_ranks_count_a_sources_samples_and_do_not_depend_on_how_they_are_asked_for(
    weights: list[float], start: int, count: int
) -> None:
    blend = Blend(weights)
    source, rank = blend.locate(np.arange(start, start + count))
    for number in range(len(weights)):
        own = rank[source == number]
        assert np.array_equal(own, np.arange(len(own)) + (own[0] if len(own) else 0))
    alone = [tuple(map(int, blend.locate(i))) for i in range(start, start + count)]
    assert alone == list(zip(source.tolist(), rank.tolist(), strict=True))
    first_source, first_rank = blend.locate(np.arange(blend.period))
    assert [int(first_rank[first_source == s][0]) for s in range(len(weights))] == [0] * len(weights)


def test_a_weight_that_cannot_be_blended_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"data\.sources\[1\]\.weight=1e-07 .*1/262144"):
        Blend([1.0, 1e-7])
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match=r"data\.sources\[0\]\.weight"):
            Blend([wrong, 1.0])


def make_order(seed: int = 1) -> Order:
    return Order(["small", "large"], [8, 40], [9, 3], Blend([1.0, 1.0]), sequence_length=10, seed=seed)


def test_each_epoch_of_a_source_draws_each_window_once_from_one_phase() -> None:
    source_B, start_B = make_order().locate(0, 2 * 40 * 32)
    for number, (windows, slack) in enumerate([(8, 9), (40, 3)]):
        orders, phases = set(), set()
        epochs = start_B[source_B == number].reshape(-1, windows)
        for epoch in epochs:
            phase = int(epoch.min())
            assert sorted(epoch.tolist()) == [phase + 10 * window for window in range(windows)]
            orders.add(tuple((epoch - phase).tolist()))
            phases.add(phase)
        assert len(orders) > 0.9 * len(epochs)
        assert phases == set(range(slack + 1))


def test_another_seed_gives_another_order() -> None:
    starts = [tuple(make_order(seed).locate(0, 50).start_B.tolist()) for seed in range(20)]
    assert len(set(starts)) == 20


@given(first=st.integers(0, 10**12), count=st.integers(1, 60), cut=st.integers(0, 60))
def test_a_samples_place_does_not_depend_on_the_range_it_is_asked_in(first: int, count: int, cut: int) -> None:
    order, cut = make_order(), min(cut, count)
    whole = order.locate(first, count)
    parts = [order.locate(first, cut), order.locate(first + cut, count - cut)]
    assert np.array_equal(whole.source_B, np.concatenate([part.source_B for part in parts]))
    assert np.array_equal(whole.start_B, np.concatenate([part.start_B for part in parts]))
