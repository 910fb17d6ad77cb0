"""Layers on stages: the slowest stage is as fast as any partition makes it."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.config.load import preset_model
from megalm.config.presets import PRESETS
from megalm.errors import UserError
from megalm.model.counts import pipeline_pieces, training_flops
from megalm.parallel.pipeline.partition import Piece, bounds_of, partition, stage_costs
from megalm.parallel.pipeline.plan import looped, v_shaped

numbers = st.integers(1, 9)


def pieces_of(times: list[int], memory: list[int] | None = None) -> list[Piece]:
    return [Piece(t, 0, 0, activation=m) for t, m in zip(times, memory or [0] * len(times), strict=True)]


@given(
    st.lists(numbers, min_size=6, max_size=10), st.lists(numbers, min_size=10, max_size=10), st.integers(1, 4), numbers
)
def test_the_slowest_stage_is_the_least_of_all_partitions_under_the_cap(
    times: list[int], memory: list[int], stages: int, cap: int
) -> None:
    memory, layers = memory[: len(times)], len(times) - 2
    caps = [2 * cap + 6 - stage for stage in range(stages)]
    pieces = pieces_of(times, memory)
    ends = [
        [0, *(1 + cut for cut in cuts), layers + 2]  # in pieces: the embedding and the head count, too
        for cuts in combinations(range(1, layers), stages - 1)
    ]
    allowed = [e for e in ends if all(sum(memory[a:b]) <= cap for cap, (a, b) in zip(caps, pairwise(e), strict=True))]
    if not allowed:
        with pytest.raises(UserError, match="no partition of"):
            partition(pieces, looped(stages, 1), caps)
        return
    bounds = partition(pieces, looped(stages, 1), caps)
    costs = stage_costs(pieces, bounds)
    assert max(costs.forward) == min(max(sum(times[a:b]) for a, b in pairwise(e)) for e in allowed)
    assert sum(costs.forward) == sum(times)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == layers
    assert all(first[1] == second[0] for first, second in pairwise(bounds))


def test_a_large_head_takes_layers_from_its_stage() -> None:
    bounds = partition(pieces_of([0] + [5] * 32 + [12]), looped(4, 1))
    sizes = [end - first for first, end in bounds]
    assert sizes[-1] == min(sizes) == 6


def test_ranks_are_balanced_where_stages_are_alike() -> None:
    for placement in (looped(4, 2), v_shaped(4)):
        costs = stage_costs(pieces := pieces_of([0] + [5] * 32 + [12]), partition(pieces, placement))
        ranks = [sum(t for t, rank in zip(costs.forward, placement, strict=True) if rank == r) for r in range(4)]
        assert max(ranks) - min(ranks) <= 7  # a layer and what the head does not fill


def test_layers_given_by_hand_are_taken_as_they_are() -> None:
    assert bounds_of([5, 6, 6, 5]) == ((0, 5), (5, 11), (11, 17), (17, 22))


@pytest.mark.parametrize("preset", [name for name in PRESETS if preset_model(name).vocab_size])
def test_modelled_costs_add_up_to_the_models_operations(preset: str) -> None:
    model = preset_model(preset)
    heads = {
        "num_kv_heads": model.num_kv_heads or model.num_heads,
        "head_dim": model.head_dim or model.hidden_size // model.num_heads,
    }
    model = model.model_copy(update=heads)
    pieces = pipeline_pieces(model, 128)
    total = sum(piece.time for piece in pieces)
    assert total * 128 == pytest.approx(training_flops(model, 128, 128 * 129 // 2), rel=1e-6)
    again = pipeline_pieces(model, 128, "full")
    assert again[1].input_gradient == pieces[1].input_gradient + pieces[1].forward
