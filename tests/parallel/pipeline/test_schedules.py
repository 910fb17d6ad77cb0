"""The known schedules: their laws for all sizes, their formulas, and torch's orders."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from megalm.parallel.pipeline.lower import lower
from megalm.parallel.pipeline.plan import Action, Op, Schedule, parse_action, placement_of
from megalm.parallel.pipeline.planner import plan_schedule
from megalm.parallel.pipeline.schedules import LOOPED, V_SHAPED, compute_orders
from megalm.parallel.pipeline.simulate import Costs, simulate
from megalm.parallel.pipeline.validate import validate

ONE_CHUNK = ("gpipe", "1f1b", "zb-h1")


@st.composite
def sizes(draw: st.DrawFn) -> tuple[Schedule, int, int, int]:
    """Schedule, ranks, chunks and micro-batches."""
    name = draw(st.sampled_from(LOOPED + V_SHAPED))
    ranks = draw(st.integers(1, 8))
    chunks = 1 if name in ONE_CHUNK else 2 if name in V_SHAPED else draw(st.integers(1, 4))
    return name, ranks, chunks, draw(st.integers(1, 4 * ranks))


def group(ranks: int, micro_batches: int) -> int:
    return -(-micro_batches // max(1, micro_batches // ranks))


def declared_peak(name: str, ranks: int, chunks: int, micro_batches: int) -> int:
    """Activations of one chunk that rank 0 holds, from the schedules' papers."""
    p, v, m, g = ranks, chunks, micro_batches, group(ranks, micro_batches)
    peaks = {
        "gpipe": m,
        "looped-bfs": m * v,
        "1f1b": p,
        "interleaved": p if v == 1 else g * (v - 1) + 2 * (p - 1) + 1,
        "zb-h1": p,
        "interleaved-zb": g * (v - 1) + p,
        "zbv": 2 * p,
        "dualpipev": 2 * p + 1,
    }
    return min(m * v, peaks[name])


def declared_bubble(name: str, p: int, f: float, i: float, w: float) -> float:
    """Of one chunk's times, where there are enough micro-batches; those of zbv and dualpipev hold for equal times."""
    if name in V_SHAPED:
        return (p - 1) * f
    return (p - 1) * (f + i - w if name in ("zb-h1", "interleaved-zb") else f + i + w)


@given(sizes(), st.booleans(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_every_plan_keeps_all_laws_within_the_declared_memory(
    size: tuple[Schedule, int, int, int], tied: bool, forward_only: bool
) -> None:
    peak = declared_peak(*size)
    plan = plan_schedule(*size, memory_cap=peak, tied=tied, forward_only=forward_only)
    simulation = simulate(plan, placement_of(*size[:3]), Costs.uniform(size[1] * size[2]))
    assert simulation.bubble >= simulation.floor - 1e-9
    if not forward_only and size[1] > 1:
        assert simulation.peaks[0] == peak or size[0] in V_SHAPED


@given(sizes(), st.sampled_from([(1, 1, 1), (1.0, 1.2, 0.8), (1.0, 2.0, 1.0)]))
@settings(max_examples=120, deadline=None)
def test_the_simulated_bubble_is_the_papers_formula(
    size: tuple[Schedule, int, int, int], times: tuple[float, float, float]
) -> None:
    name, ranks, chunks, micro_batches = size
    if name in V_SHAPED:
        micro_batches, times = micro_batches + 2 * ranks, (1, 1, 1)
    elif chunks > 1 or name.endswith(("zb", "h1")):
        micro_batches += ranks - 1
    placement = placement_of(name, ranks, chunks)
    costs = Costs.uniform(len(placement), *times)
    simulation = simulate(compute_orders(name, placement, micro_batches), placement, costs)
    assert simulation.bubble == pytest.approx(declared_bubble(name, ranks, *times), abs=1e-9)
    forward = simulate(compute_orders(name, placement, micro_batches, forward_only=True), placement, costs)
    there_and_back = 2 if name in V_SHAPED else 1  # the last activations go all the way back
    assert forward.bubble == pytest.approx(there_and_back * (ranks - 1) * times[0], abs=1e-9)


def torch_order(schedule: type, ranks: int, chunks: int, micro_batches: int, rank: int) -> list[tuple[str, int, int]]:
    """What torch's generator of a schedule gives, pairs that it overlaps one after the other."""
    rounds = max(1, micro_batches // ranks)
    state = SimpleNamespace(
        pp_group_size=ranks,
        num_stages=ranks * chunks,
        _num_stages=ranks * chunks,
        _n_microbatches=micro_batches,
        n_local_stages=chunks,
        number_of_rounds=rounds,
        microbatches_per_round=micro_batches // rounds,
        rank=rank,
    )
    order = schedule._calculate_single_rank_operations(state, rank)
    parts = [part for action in order if action for part in getattr(action, "sub_actions", None) or [action]]
    return [(part.computation_type.value, part.stage_index, part.microbatch_index) for part in parts]


@pytest.mark.parametrize(
    ("name", "torchs", "chunks"),
    [
        ("interleaved", "ScheduleInterleaved1F1B", 2),
        ("interleaved", "ScheduleInterleaved1F1B", 3),
        ("zb-h1", "ScheduleInterleavedZeroBubble", 1),
        ("interleaved-zb", "ScheduleInterleavedZeroBubble", 2),
        ("zbv", "ScheduleZBVZeroBubble", 2),
        ("dualpipev", "ScheduleDualPipeV", 2),
    ],
)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (4, 16), (6, 12)])
def test_orders_are_those_of_torch(name: Schedule, torchs: str, chunks: int, ranks: int, micro_batches: int) -> None:
    orders = compute_orders(name, placement_of(name, ranks, chunks), micro_batches)
    for rank, order in enumerate(orders):
        expected = torch_order(getattr(torch_schedules, torchs), ranks, chunks, micro_batches, rank)
        ours = [(action.op.value, action.stage, action.micro_batch) for action in order]
        if (
            name == "zbv"
        ):  # which of the waiting weight gradients comes first is free: torch ends with chunk after chunk
            assert sorted(ours) == sorted(expected)
            ours, expected = ([a[:1] if a[0] == "W" else a for a in actions] for actions in (ours, expected))
        assert ours == expected


def test_one_stage_goes_forward_and_straight_back_in_every_schedule() -> None:
    for name in (*LOOPED, *V_SHAPED):
        (actions,) = plan_schedule(name, 1, 1, 3, tied=True)
        assert " ".join(map(str, actions)) == "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2 R0"
        (actions,) = plan_schedule(name, 1, 1, 3, forward_only=True)
        assert " ".join(map(str, actions)) == "F0.0 F0.1 F0.2"


def test_both_copies_of_tied_weights_meet_after_their_reductions() -> None:
    first, last = plan_schedule("1f1b", 2, 1, 2, tied=True)
    assert list(map(str, first[-2:])) == ["R0", "T0"]
    assert list(map(str, last[-2:])) == ["R1", "T1"]
    folded = plan_schedule("zbv", 2, 2, 4, tied=True)
    assert [[str(action) for action in actions if action.op is Op.TIED] for actions in folded] == [["T0"], []]


@given(sizes())
@settings(max_examples=40, deadline=None)
def test_messages_that_wait_to_be_used_do_not_grow_with_the_micro_batches(
    size: tuple[Schedule, int, int, int],
) -> None:
    name, ranks, chunks, _ = size
    # Breadth-first, the first rank gets all micro-batches of its next chunk while it still works at the one before.
    assume(chunks == 1 or ranks == 1 or name != "looped-bfs")
    uses = {Op.FORWARD: Op.RECEIVE_ACTIVATION, Op.BACKWARD: Op.RECEIVE_GRADIENT, Op.INPUT_GRADIENT: Op.RECEIVE_GRADIENT}

    def most_waiting(micro_batches: int) -> int:
        most, plan = 0, plan_schedule(name, ranks, chunks, micro_batches)
        for actions in plan:
            waiting: set[Action] = set()
            for action in actions:
                if action.op in (Op.RECEIVE_ACTIVATION, Op.RECEIVE_GRADIENT):
                    waiting.add(action)
                elif action.op in uses:
                    waiting.discard(Action(uses[action.op], action.stage, action.micro_batch))
                most = max(most, len(waiting))
        return most

    assert most_waiting(6 * ranks) <= most_waiting(4 * ranks)


def test_an_action_is_written_as_it_is_read() -> None:
    for op in Op:
        assert parse_action(str(Action(op, 12, 3))) == Action(op, 12, 3)
    assert parse_action("R5") == Action(Op.REDUCE, 5)
    for text in ("", "X1.2", "F", "F1.x"):
        with pytest.raises(ValueError, match=r".*"):
            parse_action(text)


@pytest.mark.full
@pytest.mark.parametrize("name", LOOPED + V_SHAPED)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_number_of_micro_batches_up_to_64_is_accepted(name: Schedule, ranks: int) -> None:
    chunks = 1 if name in ONE_CHUNK else 2
    placement = placement_of(name, ranks, chunks)
    for micro_batches in range(1, 65):
        orders = compute_orders(name, placement, micro_batches)
        plan = lower(orders, placement, Costs.uniform(len(placement)))
        validate(plan, placement, micro_batches, memory_cap=declared_peak(name, ranks, chunks, micro_batches))


@given(sizes(), st.floats(0.2, 3), st.floats(0.2, 3), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_rank_does_one_thing_at_a_time_when_its_input_is_there(
    size: tuple[Schedule, int, int, int], input_gradient: float, weight_gradient: float, latency: float
) -> None:
    name, ranks, chunks, micro_batches = size
    placement = placement_of(name, ranks, chunks)
    costs = Costs.uniform(len(placement), 1, input_gradient, weight_gradient, latency)
    simulation = simulate(compute_orders(name, placement, micro_batches), placement, costs)
    when = {timed.action: timed for rank in simulation.ranks for timed in rank}
    for rank in simulation.ranks:
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(rank))
    for (op, stage, i), (start, _) in (((a.op, a.stage, a.micro_batch), t[1:]) for a, t in when.items()):
        if op is Op.FORWARD and stage > 0:
            hop = latency * (placement[stage] != placement[stage - 1])
            assert start >= when[Action(Op.FORWARD, stage - 1, i)].end + hop - 1e-9
