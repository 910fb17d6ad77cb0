from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from megalm.config.batches import plan_batches
from megalm.config.sections import Batch, BatchRamp


def slow_sizes(batch: Batch) -> Iterator[int]:
    """Megatron-LM's update rule, one step at a time, in exact fractions."""
    consumed = 0
    while True:
        size = batch.global_size
        if batch.ramp is not None and consumed <= batch.ramp.samples:
            per_size = Fraction(batch.ramp.samples * batch.ramp.increment, batch.global_size - batch.ramp.start)
            size = batch.ramp.start + int(consumed / per_size) * batch.ramp.increment
        yield size
        consumed += size


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    if draw(st.booleans()):
        return Batch(global_size=draw(st.integers(1, 50)))
    start, increment = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    size = start + increment * draw(st.integers(1, 12))
    return Batch(
        global_size=size,
        ramp=BatchRamp(start=start, increment=increment, samples=draw(st.integers(1, 1000))),
    )


@given(batches())
def test_the_plan_gives_the_sizes_and_first_samples_of_megatrons_rule(batch: Batch) -> None:
    plan = plan_batches(batch)
    slow = list(itertools.islice(slow_sizes(batch), 150))
    assert [plan.size(step) for step in range(150)] == slow
    assert [plan.first_sample(step) for step in range(151)] == [0, *itertools.accumulate(slow)]


@given(batches(), st.integers(0, 3000))
def test_steps_for_samples_are_those_of_a_loop(batch: Batch, samples: int) -> None:
    plan = plan_batches(batch)
    steps = consumed = whole = 0
    for size in slow_sizes(batch):
        if consumed >= samples:
            break
        steps, consumed = steps + 1, consumed + size
        whole = steps if consumed <= samples else whole
    assert plan.steps_for(samples) == steps
    assert plan.whole_steps(samples) == whole


@given(batches(), st.integers(1, 9000), st.integers(1, 64), st.integers(1, 60))
def test_steps_for_tokens_round_up_at_the_start_and_at_the_end_of_a_run(
    batch: Batch, tokens: int, sequence_length: int, run: int
) -> None:
    plan = plan_batches(batch)
    sizes = list(itertools.islice(slow_sizes(batch), 9000))
    taken = list(itertools.accumulate(size * sequence_length for size in sizes))
    assert plan.steps_for_tokens(tokens, sequence_length) == next(i + 1 for i, t in enumerate(taken) if t >= tokens)
    backwards = itertools.accumulate(size * sequence_length for size in reversed(sizes[:run]))
    expected = next((i + 1 for i, t in enumerate(backwards) if t >= tokens), run + 1)
    assert plan.last_steps_for_tokens(tokens, sequence_length, run) == expected


def test_a_ramp_of_a_trillion_samples_costs_nothing() -> None:
    plan = plan_batches(Batch(global_size=4096, ramp=BatchRamp(start=32, increment=32, samples=10**12)))
    assert len(plan.pieces) == 128
    assert plan.size(10**18) == 4096
    assert plan.first_sample(plan.steps_for(10**15)) >= 10**15
