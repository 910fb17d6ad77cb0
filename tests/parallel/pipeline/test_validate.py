"""A plan with one fault is refused, and the message says which law is broken."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megalm.parallel.pipeline.plan import Action, Op, Plan, PlanError, Schedule, looped, parse_action, placement_of
from megalm.parallel.pipeline.planner import plan_schedule
from megalm.parallel.pipeline.schedules import LOOPED, V_SHAPED
from megalm.parallel.pipeline.validate import validate

RECEIVES = (Op.RECEIVE_ACTIVATION, Op.RECEIVE_GRADIENT)


def parse(*ranks: str) -> Plan:
    return tuple(tuple(map(parse_action, rank.split())) for rank in ranks)


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, tuple[int, ...], int]:
    name: Schedule = draw(st.sampled_from(LOOPED + V_SHAPED))
    ranks, micro_batches = draw(st.integers(2, 4)), draw(st.integers(2, 8))
    chunks = 1 if name in ("gpipe", "1f1b", "zb-h1") else 2
    return (
        plan_schedule(name, ranks, chunks, micro_batches, tied=True),
        placement_of(name, ranks, chunks),
        micro_batches,
    )


@given(plans(), st.data())
@settings(max_examples=60, deadline=None)
def test_an_action_that_is_missing_or_done_twice_is_refused(
    case: tuple[Plan, tuple[int, ...], int], data: st.DataObject
) -> None:
    plan, placement, micro_batches = case
    rank = data.draw(st.integers(0, len(plan) - 1))
    place = data.draw(st.integers(0, len(plan[rank]) - 1))
    actions = list(plan[rank])
    actions[place : place + 1] = data.draw(st.sampled_from([[], [actions[place]] * 2]))
    where = str(plan[rank][place]).lstrip("FBIWRT<>")  # without I, W is the one too many
    with pytest.raises(PlanError, match=rf"rank {rank} has [<>]?[FBIWRT]{where} [012] times, not [01]"):
        validate((*plan[:rank], tuple(actions), *plan[rank + 1 :]), placement, micro_batches, tied=True)


@given(plans(), st.data())
@settings(max_examples=60, deadline=None)
def test_two_receives_from_one_rank_and_group_that_change_places_are_refused(
    case: tuple[Plan, tuple[int, ...], int], data: st.DataObject
) -> None:
    plan, placement, micro_batches = case
    rank = data.draw(st.integers(0, len(plan) - 1))
    actions = list(plan[rank])
    first = data.draw(st.sampled_from([i for i, action in enumerate(actions) if action.op in RECEIVES]))
    alike = [
        i
        for i, action in enumerate(actions)
        if i > first and action.op is actions[first].op and action.stage == actions[first].stage
    ]
    assume(alike)
    other = data.draw(st.sampled_from(alike))
    actions[first], actions[other] = actions[other], actions[first]
    with pytest.raises(PlanError):
        validate((*plan[:rank], tuple(actions), *plan[rank + 1 :]), placement, micro_batches, tied=True)


@given(plans(), st.data())
@settings(max_examples=60, deadline=None)
def test_an_action_before_what_it_needs_is_refused(
    case: tuple[Plan, tuple[int, ...], int], data: st.DataObject
) -> None:
    plan, placement, micro_batches = case
    rank = data.draw(st.integers(0, len(plan) - 1))
    actions = list(plan[rank])
    needy = [i for i, a in enumerate(actions) if a.op not in RECEIVES and not (a.op is Op.FORWARD and a.stage == 0)]
    actions.insert(0, actions.pop(data.draw(st.sampled_from(needy))))
    with pytest.raises(PlanError, match="which it needs"):
        validate((*plan[:rank], tuple(actions), *plan[rank + 1 :]), placement, micro_batches, tied=True)


TWO = looped(2, 1)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (
            ("F0.0 >F0.0 <B0.0 F0.1 >F0.1 <B0.1 B0.0 B0.1 R0", "<F1.0 <F1.1 F1.0 B1.0 >B1.0 F1.1 B1.1 >B1.1 R1"),
            "ranks wait for each other for ever: rank 0 at <B0.0, rank 1 at <F1.1",
        ),
        (
            ("F0.0 F0.1 >F0.0 >F0.1 <B0.0 <B0.1 B0.0 B0.1 R0", "<F1.1 <F1.0 F1.0 B1.0 >B1.0 F1.1 B1.1 >B1.1 R1"),
            "one group, two orders",
        ),
        (
            ("F0.0 F0.1 >F0.0 >F0.1 <B0.0 <B0.1 B0.0 R0 B0.1", "<F1.0 <F1.1 F1.0 B1.0 >B1.0 F1.1 B1.1 >B1.1 R1"),
            "rank 0 has R0 before B0.1, which it needs",
        ),
        (
            ("F0.0 F0.1 >F0.0 >F0.1 <B0.0 <B0.1 I0.0 B0.1 R0", "<F1.0 <F1.1 F1.0 B1.0 >B1.0 F1.1 B1.1 >B1.1 R1"),
            "rank 0 has W0.0 0 times, not 1",
        ),
    ],
)
def test_the_message_names_the_broken_law(ranks: tuple[str, str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        validate(parse(*ranks), TWO, 2)


def test_tied_weights_may_not_meet_before_both_reductions() -> None:
    placement = placement_of("zbv", 2, 2)
    plan = plan_schedule("zbv", 2, 2, 2, tied=True)
    early = [action for action in plan[0] if action.op is not Op.TIED]
    early.insert(early.index(Action(Op.REDUCE, 0)), Action(Op.TIED, 0))
    with pytest.raises(PlanError, match=r"rank 0 has T0 before R[03], which it needs"):
        validate((tuple(early), plan[1]), placement, 2, tied=True)


def test_more_memory_than_the_cap_is_refused() -> None:
    plan = plan_schedule("gpipe", 2, 1, 6)
    validate(plan, TWO, 6, memory_cap=6)
    with pytest.raises(PlanError, match="rank 0's activations take 6, more than the cap of 5"):
        validate(plan, TWO, 6, memory_cap=5)
