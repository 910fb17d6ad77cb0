from __future__ import annotations

import inspect

import pytest
import torch
from ranks import run_ranks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from zero_steps import (
    Case,
    data_mesh,
    largest_difference,
    micro_batch,
    plain_gradients,
    run_step,
    sharded,
    whole,
    zero_gradients,
)

SPLIT = "F0 F1 I0 F2 I1 W0 I2 W1 W2"


def check(case: Case, tolerance: float) -> None:
    results = run_ranks(case.layout.size, zero_gradients, case)
    nats, gradients = plain_gradients(case)
    assert sum(part for part, _ in results) == pytest.approx(nats, rel=max(tolerance, 1e-12))
    for _, ours in results:
        assert largest_difference(ours, gradients) < tolerance


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("order", ["F0 B0 F1 B1 F2 B2", "F0 F1 F2 B0 B1 B2", SPLIT, "F0 I0 F1 F2 B1 W0 B2"])
def test_every_stage_gives_the_gradients_of_one_process_in_any_order_of_passes(stage: int, order: str) -> None:
    check(Case(stage, order=order, dtype=torch.float64, compute=torch.float64), 1e-12)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("order", ["F0 B0 F1 B1 F2 B2", SPLIT])
def test_bfloat16_is_reduced_and_added_up_in_float32(stage: int, order: str) -> None:
    check(Case(stage, order=order, compute=torch.bfloat16), 2e-2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_hybrid_sharding_with_recomputation_and_tied_embeddings(stage: int) -> None:
    case = Case(stage, 2, 2, SPLIT, recompute="full", changes={"tie_embeddings": True})
    check(case, 1e-5)


def evaluate_between_steps(case: Case) -> tuple[float, float, dict[str, torch.Tensor], bool]:
    """Forward passes alone, then a step; whether parameters were at rest in between."""
    mesh = data_mesh(case)
    model, queue, sync = sharded(case, mesh)
    sync.begin()
    with torch.no_grad():
        nats = sum(model(micro_batch(3 * mesh.data.rank + i, case.length))[1].item() for i in range(3))
    sync.finish()
    at_rest = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    trained = run_step(case, model, queue, sync, mesh.data.rank, mesh.data.size)
    return nats, trained, {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}, at_rest


@pytest.mark.parametrize("stage", range(4))
def test_evaluation_leaves_parameters_at_rest_and_the_next_step_as_it_was(stage: int) -> None:
    case = Case(stage, dtype=torch.float64, compute=torch.float64)
    _, gradients = plain_gradients(case)
    for nats, trained, ours, at_rest in run_ranks(2, evaluate_between_steps, case):
        assert at_rest
        assert nats == trained
        assert largest_difference(ours, gradients) < 1e-12


def test_offloaded_parameters_give_the_same_gradients() -> None:
    check(Case(3, offload="cpu", order=SPLIT, compute=torch.bfloat16), 2e-2)


def test_torch_still_has_the_end_of_a_backward_pass_that_is_called_by_hand() -> None:
    """If this fails, see how torch/distributed/pipelining/stage.py reduces after split backward passes now."""
    assert callable(FSDPState._root_post_backward_final_callback)
    assert callable(FSDPModule._get_fsdp_state)
    assert callable(FSDPModule._set_unshard_async_op)
    assert "post_backward()" in inspect.getsource(FSDPState._root_post_backward_final_callback)
    assert "finalize_backward()" in inspect.getsource(FSDPState._root_post_backward_final_callback)
