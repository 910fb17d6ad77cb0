from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megalm.data.order import Blend, Order
from megalm.data.order.stateless import Stateless


def make_order(seed: int = 1) -> Order:
    return Order(Blend([1.0, 1.0]), Stateless(["small", "large"], [8, 40], [9, 3], sequence_length=10, seed=seed))


def test_each_epoch_of_a_source_draws_each_window_once_from_one_phase() -> None:
    source_B, _, start_B, _ = make_order().pieces(0, 2 * 40 * 32)
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
    starts = [tuple(make_order(seed).pieces(0, 50).start_P.tolist()) for seed in range(20)]
    assert len(set(starts)) == 20


@given(first=st.integers(0, 10**12), count=st.integers(1, 60), cut=st.integers(0, 60))
def test_a_samples_place_does_not_depend_on_the_range_it_is_asked_in(first: int, count: int, cut: int) -> None:
    order, cut = make_order(), min(cut, count)
    whole = order.pieces(first, count)
    parts = [order.pieces(first, cut), order.pieces(first + cut, count - cut)]
    for field in range(4):
        assert np.array_equal(whole[field], np.concatenate([part[field] for part in parts]))


def test_a_sample_is_one_piece_of_a_sequence_and_its_last_label() -> None:
    pieces = make_order().pieces(0, 50)
    assert np.array_equal(pieces.sample_B_source, pieces.source_P)
    assert pieces.length_P.tolist() == [11] * 50
