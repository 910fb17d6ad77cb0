from __future__ import annotations

import pytest
import torch

from megalm.parallel.pipeline.executor import Executor
from megalm.parallel.pipeline.planner import plan_schedule
from megalm.parallel.zero.sync import NoSync


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_accumulated_gradients_equal_those_of_the_whole_batch(micro_batches: int) -> None:
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(8, 5, dtype=torch.float64)
    whole = torch.autograd.grad((x @ weight).square().sum() / 8, weight)[0]
    parts = x.chunk(micro_batches)
    executor = Executor(plan_schedule("1f1b", 1, 1, micro_batches)[0], {0: NoSync()})
    executor.step(lambda stage, i, x: (parts[i] @ weight).square().sum() / 8)
    torch.testing.assert_close(weight.grad, whole)
