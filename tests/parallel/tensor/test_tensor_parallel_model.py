"""The whole model on several tensor ranks gives what one process gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layouts import GPT, Case, assert_same, backward, build, on_tensor_ranks
from ranks import run_ranks

CASES = {
    "llama, grouped-query": Case(),
    "without sequence sharding": Case(sequence=False),
    "overlap of 3": Case({"qk_norm": True}, overlap=3),
    "gpt, tied": Case(GPT),
    "gpt without sequence sharding, one key/value head": Case({**GPT, "num_kv_heads": 1}, sequence=False),
    "all of the loss": Case({"z_loss": 1e-2, "logit_softcap": 8.0, "label_smoothing": 0.1, "vocab_size": 99}),
    "sinks": Case({"attention": "fused_softmax", "attention_sinks": True}),
    "dropout": Case({"dropout": 0.2, "tie_embeddings": True}),
    "dropout without sequence sharding": Case({**GPT, "dropout": 0.2}, sequence=False),
    "recomputed": Case({"dropout": 0.1}, recompute="full"),
    "partly recomputed": Case({"dropout": 0.1}, recompute="selective", overlap=2),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_equal_those_of_one_process(name: str, size: int) -> None:
    case = CASES[name]
    whole = backward(build(case), case)
    assert_same(run_ranks(size, on_tensor_ranks, case), whole, rtol=1e-11, atol=1e-13)


def test_float32_stays_close() -> None:
    case = Case(dtype=torch.float32)
    assert_same(run_ranks(2, on_tensor_ranks, case), backward(build(case), case), rtol=1e-4, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compiled_blocks_equal_eager_ones(recompute: str) -> None:
    case = Case({"num_layers": 1}, recompute=recompute, dtype=torch.float32)
    ranks = run_ranks(2, on_tensor_ranks, replace(case, compiled=True), timeout=280)
    assert_same(ranks, backward(build(case), case), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", [Case({"qk_norm": True}), Case(GPT, sequence=False), Case(recompute="full")], ids=str)
def test_weight_gradients_that_wait_are_the_same_bit_for_bit(case: Case) -> None:
    later = replace(case, deferred=True)
    for now, then in zip(run_ranks(2, on_tensor_ranks, case), run_ranks(2, on_tensor_ranks, later), strict=True):
        assert now.sums == then.sums
        assert all(torch.equal(now.gradients[name], then.gradients[name]) for name in now.parts)
