from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm._order import interleave
from megalm.data.order import MAX_PERIOD, Blend, Stage, StagedBlend
from megalm.errors import UserError


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


@given(weights=weights, samples=st.integers(0, 5000))
def test_how_many_samples_a_source_has_in_a_prefix_is_counted_without_looking_at_each(
    weights: list[float], samples: int
) -> None:
    blend = Blend(weights)
    source, _ = blend.locate(np.arange(samples))
    assert blend.drawn(samples).tolist() == np.bincount(source, minlength=len(weights)).tolist()


def test_counts_that_make_no_period_are_refused() -> None:
    for wrong in ([], [0, 1], [1, -1], [2**30, 1]):
        with pytest.raises(ValueError, match="count"):
            interleave(np.array(wrong, np.int64))


NAMES = ["code", "docs", "web", "math"]
stages = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, 3), st.integers(1, 9).map(float), min_size=1),
        st.integers(1, 200),
    ),
    min_size=1,
    max_size=4,
)


def staged(parts: list[tuple[dict[int, float], int]]) -> StagedBlend:
    last = len(parts) - 1
    return StagedBlend(
        [Stage(f"s{i}", weights, None if i == last else n) for i, (weights, n) in enumerate(parts)], NAMES
    )


@given(parts=stages, first=st.integers(0, 900), count=st.integers(0, 300))
def test_each_source_goes_on_in_a_stage_where_it_stopped_in_the_one_before(
    parts: list[tuple[dict[int, float], int]], first: int, count: int
) -> None:
    blend = staged(parts)
    source, rank = blend.locate(np.arange(1200))
    for number in range(len(NAMES)):
        assert np.array_equal(rank[source == number], np.arange((source == number).sum()))
    assert [part.tolist() for part in blend.locate(np.arange(first, first + count))] == [
        part[first : first + count].tolist() for part in (source, rank)
    ]
    assert blend.drawn(first).tolist() == np.bincount(source[:first], minlength=len(NAMES)).tolist()


@given(parts=stages)
def test_every_prefix_of_every_stage_is_within_one_sample_of_the_stages_weights(
    parts: list[tuple[dict[int, float], int]],
) -> None:
    source, _ = staged(parts).locate(np.arange(1200))
    first = 0
    for stage, (weights, length) in enumerate(parts):
        end = 1200 if stage == len(parts) - 1 else first + length
        mine, total = source[first:end], sum(weights.values())
        assert set(mine.tolist()) <= set(weights)
        for number, weight in weights.items():
            behind = np.cumsum(mine == number) - np.arange(1, len(mine) + 1) * weight / total
            assert np.abs(behind).max() < 1 + 1e-9
        first = end


def test_a_stages_weight_that_cannot_be_blended_is_refused_by_its_key() -> None:
    with pytest.raises(UserError, match=r"data\.stages\[1\]\.weights\.docs=1e-07"):
        staged([({0: 1.0}, 5), ({0: 1.0, 1: 1e-7}, 5)])


def test_only_the_last_stage_has_no_end() -> None:
    for lengths in ([None, None], [3, 3]):
        with pytest.raises(ValueError, match="last stage"):
            StagedBlend([Stage("s", {0: 1.0}, length) for length in lengths], NAMES)
