from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm._order import pack
from megalm.data.dataset import Source
from megalm.data.order import PADDING, Blend, Order
from megalm.data.order.window import Window

WriteSource = Callable[..., Path]


def slow_pack(lengths: list[int], bins: int, slots: int, open_end: bool) -> list[list[tuple[int, int, int]]]:
    """The pieces (document, skipped, length) of each bin, by a sorted list of (room, bin)."""
    room = [(slots, number) for number in range(bins)]
    packed: list[list[tuple[int, int, int]]] = [[] for _ in range(bins)]

    def put(space: tuple[int, int], item: int, skip: int, length: int) -> None:
        room.remove(space)
        packed[space[1]].append((item, skip, length))
        if space[0] > length:
            insort(room, (space[0] - length, space[1]))

    def fit(item: int, skip: int, length: int) -> bool:
        fitting = [space for space in room if space[0] >= length]
        if fitting:
            put(min(fitting), item, skip, length)
        return bool(fitting)

    def cut(item: int, skip: int, length: int) -> tuple[int, int, int]:
        most = max(space[0] for space in room)
        put(min(space for space in room if space[0] == most), item, skip, most)
        return item, skip + most - 1, length - most + 1

    rest = []
    for item, length in enumerate(lengths[:-1] if open_end else lengths):
        piece = (item, 0, length)
        while piece[2] > slots:
            piece = cut(*piece)
        rest.append(piece)
    rest = [piece for piece in sorted(rest, key=lambda piece: -piece[2]) if not fit(*piece)]
    if open_end:
        rest.append((len(lengths) - 1, 0, lengths[-1]))
    for piece in rest:
        while not fit(*piece):
            piece = cut(*piece)
    return packed


packings = st.tuples(st.integers(1, 12), st.integers(2, 12)).flatmap(
    lambda shape: st.tuples(
        st.lists(st.integers(1, 30), min_size=1, max_size=40),
        st.just(shape[0]),
        st.just(shape[1]),
        st.booleans(),
    )
)


def fitted(lengths: list[int], room: int) -> list[int]:
    """The first documents that fit, the last one shortened to fill the room exactly."""
    kept: list[int] = []
    for length in lengths:
        kept.append(min(length, room - sum(kept)))
    return [length for length in kept if length] or [room]


@given(packings)
def test_packing_equals_a_plain_best_fit_and_places_every_prediction_once(
    case: tuple[list[int], int, int, bool],
) -> None:
    lengths, bins, slots, open_end = case
    lengths = fitted(lengths, bins * (slots - 1))
    item, skip, length, first = pack(np.array(lengths), bins, slots, open_end)
    pieces = list(zip(item.tolist(), skip.tolist(), length.tolist(), strict=True))
    cuts = first.tolist()
    packed = [pieces[a:b] for a, b in pairwise(cuts)]
    assert packed == slow_pack(lengths, bins, slots, open_end)
    assert all(sum(piece[2] for piece in content) <= slots for content in packed)
    predictions = Counter(
        (document, token) for document, skipped, n in pieces for token in range(skipped, skipped + n - 1)
    )
    assert predictions == Counter((document, token) for document, n in enumerate(lengths) for token in range(n - 1))
    tokens = {(document, token) for document, skipped, n in pieces for token in range(skipped, skipped + n)}
    assert tokens == {(document, token) for document, n in enumerate(lengths) for token in range(n)}
    for content in packed:  # a piece without its document's end is the last of its sample
        for document, skipped, n in content[:-1]:
            ends = skipped + n == lengths[document] and not (open_end and document == len(lengths) - 1)
            assert ends or content[-1][0] == len(lengths) - 1


def test_what_cannot_be_packed_is_refused() -> None:
    for lengths in ([0], [-1], [5, 5], [2**62, 2**62]):
        with pytest.raises(ValueError, match="document"):
            pack(np.array(lengths), 2, 5, False)


@given(seed=st.integers(0, 10**6))
def test_documents_that_fit_whole_stay_whole_while_there_is_room(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 33, 200)
    room: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):  # best fit, with as many bins as it wants
        fitting = [space for space in room if space >= length]
        if fitting:
            room.remove(min(fitting))
        room.append((min(fitting) if fitting else 33) - length)
    bins = max(len(room), -(-int(lengths.sum()) // 32))
    _, skip, packed, first = pack(lengths, bins, 33, False)
    assert not skip.any()
    assert sorted(packed.tolist()) == sorted(lengths.tolist())
    assert first[-1] == len(lengths)


class Text:
    """A source of documents of these lengths."""

    def __init__(self, lengths: list[int]) -> None:
        self.starts = np.cumsum([0, *lengths])[:-1]
        self.tokens = sum(lengths)

    def document_starts(self, first: int, end: int) -> np.ndarray:
        return self.starts[(self.starts >= first) & (self.starts < end)]


texts = st.lists(
    st.lists(st.integers(0, 40), min_size=3, max_size=60).filter(lambda lengths: sum(lengths) >= 30),
    min_size=1,
    max_size=3,
)


def make_order(lengths: list[list[int]], length: int, window_tokens: int, seed: int) -> Order:
    sources = [Text(part) for part in lengths]
    names = [f"s{number}" for number in range(len(sources))]
    window = Window(names, sources, [source.tokens for source in sources], length, window_tokens, seed)
    return Order(Blend([1.0] * len(sources)), window)


@given(lengths=texts, length=st.integers(1, 12), windows=st.integers(1, 200), seed=st.integers(0, 99))
def test_in_each_epoch_each_prediction_inside_of_a_documents_part_is_made_once(
    lengths: list[list[int]], length: int, windows: int, seed: int
) -> None:
    order = make_order(lengths, length, windows, seed)
    for number, part in enumerate(lengths):
        starts = {start for start, n in zip(np.cumsum([0, *part]).tolist(), part, strict=False) if n}
        samples = int(order.places.epoch_samples[number])
        size = max(1, windows // length) * length
        for epoch in (0, 3):
            pieces = order.places.pieces(np.full(samples, number), epoch * samples + np.arange(samples))
            assert np.add.reduce(pieces.length_P) == samples * (length + 1)
            text = pieces.source_P == number
            assert (pieces.source_P[~text] == PADDING).all()
            spans = list(zip(pieces.start_P[text].tolist(), pieces.length_P[text].tolist(), strict=True))
            first = min(start for start, _ in spans)
            assert 0 <= first <= sum(part) - samples * length
            end = first + samples * length
            assert {token for start, n in spans for token in range(start, start + n)} == set(range(first, end))
            made = Counter(token for start, n in spans for token in range(start, start + n - 1))
            inside = [
                t
                for t in range(first, end - 1)
                if t + 1 not in starts and (t + 1 - first) % size  # no end between them
            ]
            assert made == Counter(inside)


@given(lengths=texts, length=st.integers(1, 12), windows=st.integers(1, 200))
def test_a_sample_is_padded_once_at_most_and_before_its_last_piece(
    lengths: list[list[int]], length: int, windows: int
) -> None:
    order = make_order(lengths, length, windows, 1)
    total = int(order.places.epoch_samples[0])
    for rank in range(total):
        pieces = order.places.pieces(np.array([0]), np.array([rank]))
        assert pieces.length_P.sum() == length + 1
        assert (pieces.length_P > 0).all()
        padding = np.flatnonzero(pieces.source_P == PADDING)
        assert len(padding) <= 1
        if len(padding) and len(pieces.source_P) > 1:
            assert padding[0] == len(pieces.source_P) - 2


@given(lengths=texts, length=st.integers(1, 12), windows=st.integers(1, 200))
def test_every_piece_but_the_last_of_a_sample_ends_with_its_document(
    lengths: list[list[int]], length: int, windows: int
) -> None:
    order = make_order(lengths, length, windows, 1)
    ends = set(np.cumsum(lengths[0]).tolist())
    samples = int(order.places.epoch_samples[0])
    pieces = order.places.pieces(np.zeros(samples, np.int64), np.arange(samples))
    filled = np.cumsum(pieces.length_P)
    for source, start, n, total in zip(pieces.source_P, pieces.start_P, pieces.length_P, filled, strict=True):
        assert source == PADDING or start + n in ends or total % (length + 1) == 0


@given(lengths=texts, first=st.integers(0, 400), count=st.integers(1, 40), cut=st.integers(0, 40))
def test_a_sample_does_not_depend_on_what_was_asked_for_before(
    lengths: list[list[int]], first: int, count: int, cut: int
) -> None:
    cut = min(cut, count)
    used, fresh = make_order(lengths, 5, 20, 7), make_order(lengths, 5, 20, 7)
    used.pieces(0, 100)
    whole = used.pieces(first, count)
    parts = [fresh.pieces(first + cut, count - cut), fresh.pieces(first, cut)][::-1]
    for field in range(4):
        assert np.array_equal(whole[field], np.concatenate([part[field] for part in parts]))


def test_orders_differ_between_epochs_and_seeds_and_sources() -> None:
    lengths = [[7, 3, 9, 4, 12, 8] * 9] * 2
    seen = set()
    for seed in range(3):
        order = make_order(lengths, 8, 80, seed)
        for source in (0, 1):
            samples = int(order.places.epoch_samples[source])
            for epoch in range(3):
                pieces = order.places.pieces(np.full(samples, source), epoch * samples + np.arange(samples))
                seen.add(tuple(pieces.start_P[pieces.source_P == source].tolist()))
    assert len(seen) == 3 * 2 * 3


def test_the_documents_of_a_window_are_in_another_order_in_each_epoch_and_source() -> None:
    order = make_order([[10] * 80] * 2, 10, 800, 5)  # one window a source, without a phase
    orders = set()
    for source in (0, 1):
        for epoch in range(10):
            pieces = order.places.pieces(np.full(80, source), epoch * 80 + np.arange(80))
            orders.add(tuple(pieces.start_P[pieces.source_P == source].tolist()))
    assert len(orders) == 20


def test_windows_come_in_random_order_the_short_last_one_included() -> None:
    order = make_order([[10] * 105], 10, 100, 3)
    places, orders = set(), set()
    for epoch in range(60):
        pieces = order.places.pieces(np.zeros(105, np.int64), epoch * 105 + np.arange(105))
        windows = [window for window, _ in groupby((pieces.start_P[pieces.source_P == 0] // 100).tolist())]
        assert sorted(windows) == list(range(11))
        places.add(windows.index(10))
        orders.add(tuple(window for window in windows if window < 10))
    assert len(places) == 11
    assert len(orders) == 60


def test_a_source_tells_where_its_documents_start_over_shards(write_source: WriteSource) -> None:
    shards = [[[1] * n for n in (3, 0, 2, 5)], [[2] * 4], [[], [3], [4, 4], []]]
    source = Source("one", write_source(shards), "f00d")
    starts = [0, 3, 3, 5, 10, 14, 14, 15]
    for first in range(18):
        for end in range(first, 19):
            found = source.document_starts(first, end).tolist()
            assert sorted(set(found)) == sorted({s for s in starts if first <= s < end})
    assert source.sequence_lengths().tolist() == [3, 0, 2, 5, 4, 0, 1, 2, 0]
