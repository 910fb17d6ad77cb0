"""Gradients of a pipeline are those of one process, whatever the schedule."""

from __future__ import annotations

import pytest
import torch
from parallel.pipeline.stages import Case, Pipeline, micro_batch, whole_gradients
from ranks import run_ranks
from torch import Tensor

from megalm.parallel.mesh import Layout
from megalm.parallel.pipeline.planner import plan_schedule
from megalm.parallel.pipeline.simulate import Costs, simulate

SCHEDULES = [
    ("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("looped-bfs", 2), ("zb-h1", 1), ("interleaved-zb", 2), ("zbv", 2),
    ("dualpipev", 2),
]  # fmt: skip


def one_step(case: Case, lengths: list[int] | None = None) -> tuple[dict[tuple[int, str], Tensor], int, list[float]]:
    pipeline = Pipeline(case)
    executor = pipeline.executor()
    batch = [micro_batch(i) for i in range(case.micro_batches)]
    pipeline.step(executor, batch)
    return pipeline.gradients(), executor.peak, list(pipeline.losses.values())


@pytest.mark.parametrize("micro_batches", [1, 3, 8])
@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_are_those_of_one_process_bit_for_bit(
    schedule: str, chunks: int, ranks: int, micro_batches: int
) -> None:
    case = Case(schedule, Layout(pipeline=ranks), chunks, micro_batches)
    wanted, loss = whole_gradients(case, [micro_batch(i) for i in range(micro_batches)])
    results = run_ranks(ranks, one_step, case)
    found = {name: gradient for gradients, _, _ in results for (_, name), gradient in gradients.items()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert sum(loss for _, _, losses in results for loss in losses) == pytest.approx(loss, rel=1e-14)
    plan = plan_schedule(schedule, ranks, chunks, micro_batches)
    peaks = simulate(plan, case.placement, Costs.uniform(len(case.placement))).peaks
    for rank, (_, peak, _) in enumerate(results):
        assert 0 < peak <= peaks[rank]
