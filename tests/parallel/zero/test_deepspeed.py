from __future__ import annotations

import pytest
import torch
from parallel.tensor.layouts import GPT
from parallel.zero.engines import (
    CLIP,
    Run,
    continue_under_deepspeed,
    score_in_between,
    train_alone,
    train_under_deepspeed,
    whole,
)
from ranks import forget_ranks, run_ranks

from megalm.parallel.mesh import Layout

pytest.importorskip("deepspeed", reason="the package deepspeed is not installed")

LAYOUTS = {"data 2": Layout(data_shard=2), "data 4": Layout(data_shard=4), "tensor 2": Layout(data_shard=2, tensor=2)}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    forget_ranks()  # DeepSpeed numbers parameters from the start of the process, and all ranks have to agree
    return LAYOUTS[request.param]


def assert_as_one_process(run: Run, tolerance: float = 1e-5) -> None:
    ranks = run_ranks(run.layout.size, train_under_deepspeed, run)
    alone, state = train_alone(run)
    for rank in ranks:
        torch.testing.assert_close(rank.losses, alone.losses, rtol=tolerance, atol=0)
        torch.testing.assert_close(rank.norms, alone.norms, rtol=tolerance, atol=0)
    assert max(alone.norms) > CLIP, "clipping is seen"
    for name, value in whole(ranks):
        loose = 3e-4 if name.startswith("model.") else 1e-5  # a tenth of AdamW's step, even where gradients are noise
        torch.testing.assert_close(
            value, state.pop(name), rtol=100 * tolerance, atol=loose * tolerance / 1e-5, msg=name
        )
    assert not state, "all of it is held"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_step_is_that_of_one_process(layout: Layout, stage: int) -> None:
    assert_as_one_process(Run(layout, stage))


VARIANTS = {
    "offloaded": Run(LAYOUTS["tensor 2"], 1, offload="cpu"),
    "offloaded gradients": Run(LAYOUTS["tensor 2"], 2, offload="cpu"),
    "offloaded parameters": Run(LAYOUTS["tensor 2"], 3, offload="cpu"),
    "gpt": Run(LAYOUTS["tensor 2"], 3, model={k: v for k, v in GPT.items() if k != "head_dim"}),
    "tied, with norms of queries": Run(LAYOUTS["tensor 2"], 3, model={"tie_embeddings": True, "qk_norm": True}),
    "repeated keys": Run(LAYOUTS["tensor 2"], 2, model={"num_kv_heads": 1}),
    "recomputed": Run(LAYOUTS["data 4"], 3, recompute="full"),
    "kept": Run(LAYOUTS["data 4"], 3, deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_kept_or_shared_elsewhere_changes_nothing(variant: str) -> None:
    assert_as_one_process(VARIANTS[variant])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_comes_close(stage: int) -> None:
    assert_as_one_process(Run(LAYOUTS["tensor 2"], stage, compute="bfloat16"), 2e-2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_goes_on_under_another_engine_stage_and_layout(stage: int) -> None:
    alone, _ = train_alone(Run(steps=6))
    _, values = train_alone(Run(steps=2))
    there = Run(LAYOUTS["tensor 2"], stage, steps=4)
    ranks = run_ranks(4, continue_under_deepspeed, there, 2, values)
    values = dict(whole(ranks))
    here = Run(LAYOUTS["data 4"], 4 - stage, offload="cpu", steps=6)
    last = run_ranks(4, continue_under_deepspeed, here, 4, values)
    for rank, other in zip(ranks, last, strict=True):
        torch.testing.assert_close(rank.losses + other.losses, alone.losses[2:], rtol=1e-5, atol=0)
        torch.testing.assert_close(rank.norms + other.norms, alone.norms[2:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_evaluation_between_the_steps_changes_nothing(stage: int) -> None:
    for without, scored in run_ranks(4, score_in_between, Run(LAYOUTS["tensor 2"], stage)):
        assert without == scored


def test_one_process_needs_no_launcher() -> None:
    forget_ranks()
    assert_as_one_process(Run(Layout(), 3, offload="cpu", steps=4))
