from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from zero_steps import Case, largest_difference, plain_gradients, zero_gradients

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
