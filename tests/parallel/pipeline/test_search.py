"""`auto`: at the floor without latency, with it never worse than a template, and the same wherever it is made."""

from __future__ import annotations

import pytest

from megalm.errors import UserError
from megalm.parallel.pipeline.plan import Placement, looped, v_shaped
from megalm.parallel.pipeline.planner import plan_schedule
from megalm.parallel.pipeline.schedules import compute_orders, templates
from megalm.parallel.pipeline.search import search
from megalm.parallel.pipeline.simulate import Costs, simulate

TIMES = [(1, 1, 1), (1, 1.2, 0.8), (1, 1.6, 0.8), (1, 0.8, 1.2), (1, 1.3, 1.1), (1, 2, 1)]
LAYOUTS = [(2, 1, 8), (4, 1, 16), (4, 2, 16), (4, 3, 12), (8, 2, 16)]


def best_template(placement: Placement, micro_batches: int, costs: Costs, cap: float) -> float:
    results = [simulate(compute_orders(n, placement, micro_batches), placement, costs) for n in templates(placement)]
    return min(result.bubble for result in results if max(result.peaks) <= cap)


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), LAYOUTS)
@pytest.mark.parametrize("times", TIMES)
def test_without_latency_the_bubble_is_within_15_percent_of_the_floor(
    ranks: int, chunks: int, micro_batches: int, times: tuple[float, float, float]
) -> None:
    placement, cap = looped(ranks, chunks), 2 * ranks * chunks
    costs = Costs.uniform(len(placement), *(time / chunks for time in times))
    result = simulate(search(placement, micro_batches, costs, cap), placement, costs)
    assert result.bubble <= 1.15 * (ranks - 1) / chunks
    assert max(result.peaks) <= cap


@pytest.mark.parametrize("latency", [0.05, 0.3])
@pytest.mark.parametrize("placement", [looped(4, 1), looped(3, 2), v_shaped(4)])
@pytest.mark.parametrize("room", [1.0, 1.5])
def test_with_latency_no_template_of_the_same_memory_is_better(
    placement: Placement, latency: float, room: float, record_property: pytest.RecordProperty
) -> None:
    ranks = max(placement) + 1
    chunks = len(placement) // ranks
    costs = Costs.uniform(len(placement), 1 / chunks, 1.2 / chunks, 0.8 / chunks, latency)
    cap = room * ranks * chunks
    result = simulate(search(placement, 9, costs, cap), placement, costs)
    assert max(result.peaks) <= cap
    assert result.bubble <= best_template(placement, 9, costs, cap) + 1e-9
    record_property("over (p-1)(F/v+c)", result.bubble / ((ranks - 1) * (1 / chunks + latency)))


def test_uneven_stages_are_planned_for_their_own_costs() -> None:
    costs = Costs((1, 1, 1, 1.2), (1.2, 1.2, 1.2, 1.4), (0.8, 0.8, 0.8, 1), (1, 1, 1, 1))
    placement = looped(4, 1)
    result = simulate(search(placement, 12, costs, 8), placement, costs)
    assert result.bubble <= 1.15 * result.floor
    assert result.bubble < best_template(placement, 12, costs, 8)


def test_a_small_cap_is_kept_and_one_that_nothing_keeps_is_a_mistake() -> None:
    serial = simulate(search(looped(4, 1), 8, Costs.uniform(4), 1), looped(4, 1), Costs.uniform(4))
    assert serial.peaks == (1, 1, 1, 1)
    with pytest.raises(UserError, match=r"no order was found .* no more than 0\.5 .*the leanest template takes 4"):
        search(looped(4, 1), 8, Costs.uniform(4), 0.5)
    with pytest.raises(UserError, match="schedule=gpipe: a rank's activations take 8 at once, more than the cap of 4"):
        plan_schedule("gpipe", 4, 1, 8, memory_cap=4)
