"""A pipeline of gloo ranks gives the gradients of one process, whatever the schedule, and keeps within its plan."""

from __future__ import annotations

import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from parallel.pipeline.stages import HIDDEN, LENGTH, Case, Pipeline, micro_batch, whole_gradients
from ranks import RankError, run_ranks
from torch import Tensor

from megalm.parallel.mesh import Layout
from megalm.parallel.pipeline.planner import plan_schedule
from megalm.parallel.pipeline.recording import Recording
from megalm.parallel.pipeline.simulate import Costs, simulate
from megalm.parallel.pipeline.timeline import read_timeline

SCHEDULES = [
    ("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("looped-bfs", 2), ("zb-h1", 1), ("interleaved-zb", 2), ("zbv", 2),
    ("dualpipev", 2),
]  # fmt: skip
COUNTS = (1, 3, 8)  # micro-batches


def step_of_each_count(case: Case) -> list[tuple[dict[str, Tensor], float, int]]:
    """Gradients, losses and peak of steps with so many micro-batches."""
    pipeline, results = Pipeline(case), []
    for count in COUNTS:
        executor = pipeline.executor(count)
        pipeline.step(executor, [micro_batch(i) for i in range(count)])
        results.append((pipeline.gradients(), sum(pipeline.losses.values()), executor.peak))
        pipeline.forget_gradients()
    return results


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_gradients_are_those_of_one_process_bit_for_bit_and_activations_as_few_as_simulated(
    schedule: str, chunks: int, ranks: int
) -> None:
    case = Case(schedule, Layout(pipeline=ranks), chunks)  # type: ignore[arg-type]
    results = run_ranks(ranks, step_of_each_count, case)
    for i, count in enumerate(COUNTS):
        wanted, loss = whole_gradients(case, [micro_batch(i) for i in range(count)])
        found = {name: gradient for rank in results for name, gradient in rank[i][0].items()}
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
        assert sum(rank[i][1] for rank in results) == pytest.approx(loss, rel=1e-14)
        plan = plan_schedule(case.schedule, ranks, chunks, count)
        peaks = simulate(plan, case.placement, Costs.uniform(len(case.placement))).peaks
        assert all(0 < rank[i][2] <= peak for rank, peak in zip(results, peaks, strict=True))


def one_step(case: Case) -> list[str]:
    """The names of gradients that are not this rank's part of one process's."""
    pipeline = Pipeline(case)
    data, count = pipeline.mesh.data, case.micro_batches
    pipeline.step(pipeline.executor(), [micro_batch(data.rank * count + i) for i in range(count)])
    wanted = pipeline.mine(whole_gradients(case, [micro_batch(i) for i in range(data.size * count)])[0])
    found = pipeline.gradients()
    assert found.keys() == wanted.keys()
    return [name for name in wanted if not torch.allclose(found[name], wanted[name], rtol=1e-12, atol=1e-16)]


def test_an_order_that_was_searched_for_gives_the_gradients_of_one_process_but_for_rounding() -> None:
    case = Case("auto", Layout(pipeline=4), micro_batches=8)  # whole and split backward passes add up in another order
    assert run_ranks(4, one_step, case) == [[]] * 4


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved-zb", 2), ("dualpipev", 2)])
def test_every_stage_of_zero_goes_with_every_kind_of_schedule(schedule: str, chunks: int, zero_stage: int) -> None:
    layout = Layout(pipeline=2, data_replicate=2) if zero_stage == 0 else Layout(pipeline=2, data_shard=2)
    case = Case(schedule, layout, chunks, tied=zero_stage % 2 == 0, zero_stage=zero_stage)  # type: ignore[arg-type]
    assert run_ranks(4, one_step, case) == [[]] * 4


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("zbv", 2)])
def test_tensor_ranks_share_the_stages_of_a_pipeline(schedule: str, chunks: int) -> None:
    case = Case(schedule, Layout(pipeline=2, tensor=2), chunks, tied=True)  # type: ignore[arg-type]
    assert run_ranks(4, one_step, case) == [[]] * 4


@pytest.mark.full
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_tensor_pipeline_and_data_ranks_go_together(schedule: str, chunks: int, zero_stage: int) -> None:
    layout = Layout(pipeline=2, data_shard=2, tensor=2)
    case = Case(schedule, layout, chunks, tied=True, zero_stage=zero_stage)  # type: ignore[arg-type]
    assert run_ranks(8, one_step, case) == [[]] * 8


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_activations_may_be_computed_again_in_either_half_of_a_backward_pass(recompute: str) -> None:
    case = Case("dualpipev", Layout(pipeline=2), 2, recompute=recompute)  # type: ignore[arg-type]
    assert run_ranks(2, one_step, case) == [[]] * 2


def test_a_stage_may_have_no_layers() -> None:
    assert run_ranks(4, one_step, Case(layout=Layout(pipeline=4), layers=2, cut=(1, 0, 0, 1))) == [[]] * 4


def tied_weights(case: Case) -> list[Tensor]:
    pipeline = Pipeline(case)
    executor = pipeline.executor()
    for step in range(3):
        pipeline.step(executor, [micro_batch(10 * step + i) for i in range(case.micro_batches)])
        with torch.no_grad():
            for model in pipeline.models.values():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=0.1)
        pipeline.forget_gradients()
    return [m.embedding.weight.detach() for m in pipeline.models.values() if m.embedding is not None]


@pytest.mark.parametrize(("schedule", "chunks", "ranks"), [("1f1b", 1, 3), ("zbv", 2, 2)])
def test_both_copies_of_tied_weights_stay_equal_bit_for_bit(schedule: str, chunks: int, ranks: int) -> None:
    case = Case(schedule, Layout(pipeline=ranks), chunks, tied=True, layers=12)  # type: ignore[arg-type]
    first, last = (copy for copies in run_ranks(ranks, tied_weights, case) for copy in copies)
    assert torch.equal(first, last)


def evaluate(case: Case) -> tuple[float, bool, int]:
    pipeline = Pipeline(case)
    pipeline.step(pipeline.executor(forward_only=True), [micro_batch(i) for i in range(case.micro_batches)])
    grads = [p.grad for model in pipeline.models.values() for p in model.parameters()]
    executor = pipeline.executor()
    pipeline.step(executor, [micro_batch(i) for i in range(case.micro_batches)])  # training goes on after it
    return sum(pipeline.losses.values()), all(grad is None for grad in grads), len(pipeline.losses)


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 2), ("zbv", 2)])
def test_evaluation_is_a_plan_of_forward_passes_alone(schedule: str, chunks: int) -> None:
    case = Case(schedule, chunks=chunks)  # type: ignore[arg-type]
    results = run_ranks(2, evaluate, case)
    _, loss = whole_gradients(case, [micro_batch(i) for i in range(case.micro_batches)])
    assert sum(result[0] for result in results) == pytest.approx(loss, rel=1e-14)
    assert all(result[1] for result in results)
    assert sum(result[2] for result in results) == case.micro_batches


def buffers_after_steps(case: Case) -> list[int]:
    pipeline, made = Pipeline(case), []
    for count in (8, 32):
        executor = pipeline.executor(count)
        pipeline.step(executor, [micro_batch(i) for i in range(count)])
        pipeline.step(executor, [micro_batch(i) for i in range(count)])
        made.append(executor.buffers.made)
    return made


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("zbv", 2)])
def test_buffers_for_messages_do_not_grow_with_the_micro_batches(schedule: str, chunks: int) -> None:
    case = Case(schedule, Layout(pipeline=4), chunks)  # type: ignore[arg-type]
    for few, many in run_ranks(4, buffers_after_steps, case):
        assert 0 < many == few <= 3 * len(case.placement)


def steps_of_other_lengths(case: Case) -> list[bool]:
    pipeline, equal = Pipeline(case), []
    executor = pipeline.executor()
    for lengths in ([8, 8, 8, 8], [4, 4, 4, 4], [2, 8, 4, 6]):
        batch = [micro_batch(i, length) for i, length in enumerate(lengths)]
        pipeline.step(executor, batch)
        wanted = pipeline.mine(whole_gradients(case, batch)[0])
        equal.append(all(torch.equal(gradient, wanted[name]) for name, gradient in pipeline.gradients().items()))
        pipeline.forget_gradients()
    return equal


def test_micro_batches_may_have_other_lengths_in_each_step_and_among_themselves() -> None:
    assert run_ranks(2, steps_of_other_lengths, Case()) == [[True] * 3] * 2


def lose(case: Case, how: str) -> None:
    """The last rank is gone in the middle of a step."""
    pipeline = Pipeline(case, timeout=2)
    executor = pipeline.executor()
    batch = [micro_batch(i) for i in range(case.micro_batches)]
    pipeline.step(executor, batch)
    if pipeline.mesh.pipeline.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(20)
    pipeline.step(executor, batch)


@pytest.mark.parametrize("how", ["killed", "stuck"])
def test_a_rank_that_is_gone_ends_the_others_in_time_and_is_named(how: str) -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match=r"pipeline rank 1 \(rank 1\) died or took too long while this rank was"):
        run_ranks(2, lose, Case(), how, timeout=30, grace=8 if how == "killed" else 0.5)
    assert time.monotonic() - started < 25


def record(case: Case, path: Path) -> None:
    pipeline = Pipeline(case)
    executor, batch = pipeline.executor(), [micro_batch(i) for i in range(case.micro_batches)]
    pipeline.step(executor, batch)
    recording = Recording(pipeline.mesh)
    pipeline.step(executor, batch, recording)
    recording.write(path, case.schedule, case.placement, [2, 2, 2, 2], case.micro_batches)


def test_a_step_is_recorded_as_it_ran_on_all_ranks(tmp_path: Path) -> None:
    case = Case("zbv", Layout(pipeline=2), 2)
    run_ranks(2, record, case, tmp_path / "timeline.json")
    timeline = read_timeline(tmp_path / "timeline.json")
    assert (timeline.schedule, timeline.placement, timeline.micro_batches) == ("zbv", (0, 1, 1, 0), 4)
    assert timeline.bytes == 4 * 4 * 2 * LENGTH * HIDDEN * 8  # two edges, there and back, float64
    plan = plan_schedule("zbv", 2, 2, 4)
    for recorded, planned in zip(timeline.ranks, plan, strict=True):
        assert [str(timed.action) for timed in recorded] == [str(a) for a in planned if a.op.value in "FBIW"]
        assert all(before.end <= after.start for before, after in pairwise(recorded))
    ends = {timed.action: timed for rank in timeline.ranks for timed in rank}
    for action, timed in ends.items():
        if action.op.value == "F" and action.stage > 0:
            before = next(
                t
                for a, t in ends.items()
                if (a.op, a.micro_batch) == (action.op, action.micro_batch) and a.stage == action.stage - 1
            )
            assert before.end <= timed.start
