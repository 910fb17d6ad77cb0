from __future__ import annotations

import pytest
import torch

from megalm.parallel.pipeline.executor import Executor
from megalm.parallel.pipeline.plan import one_stage_plan
from megalm.parallel.zero.sync import NoSync


def test_each_micro_batch_goes_forward_and_straight_back() -> None:
    assert " ".join(map(str, one_stage_plan(3)[0])) == "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2"
    assert " ".join(map(str, one_stage_plan(3, forward_only=True)[0])) == "F0.0 F0.1 F0.2"


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_accumulated_gradients_equal_those_of_the_whole_batch(micro_batches: int) -> None:
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(8, 5, dtype=torch.float64)
    whole = torch.autograd.grad((x @ weight).square().sum() / 8, weight)[0]
    parts = x.chunk(micro_batches)
    executor = Executor(one_stage_plan(micro_batches)[0], {0: NoSync()})
    executor.step(lambda stage, i, x: (parts[i] @ weight).square().sum() / 8)
    torch.testing.assert_close(weight.grad, whole)
