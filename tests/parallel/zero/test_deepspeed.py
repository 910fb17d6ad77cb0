from __future__ import annotations

import pytest
import torch
from parallel.zero.engines import Run, train_alone, train_under_deepspeed, whole
from ranks import run_ranks

from megalm.parallel.mesh import Layout

pytest.importorskip("deepspeed", reason="the package deepspeed is not installed")

LAYOUTS = {"data 2": Layout(data_shard=2), "data 4": Layout(data_shard=4), "tensor 2": Layout(data_shard=2, tensor=2)}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_step_is_that_of_one_process(layout: str, stage: int) -> None:
    run = Run(LAYOUTS[layout], stage)
    ranks = run_ranks(run.layout.size, train_under_deepspeed, run)
    alone, state = train_alone(run)
    for rank in ranks:
        torch.testing.assert_close(rank.losses, alone.losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(rank.norms, alone.norms, rtol=1e-5, atol=0)
    assert max(alone.norms) > 0.5, "clipping is seen"
    for name, value in whole(ranks):
        torch.testing.assert_close(value, state.pop(name), rtol=1e-3, atol=1e-5, msg=name)
    assert not state, "all of it is held"
