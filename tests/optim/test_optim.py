from __future__ import annotations

import math

import pytest
import torch
import transformers

from megalm.config.sections import Model, Optimizer
from megalm.model.transformer import Transformer
from megalm.optim.adamw import build_adamw, decays
from megalm.optim.schedule import learning_rate_factor

STEPS, WARMUP, DECAY, LEAST = 50, 10, 15, 0.1


def peers_factors(kind: str) -> list[float]:
    """transformers' schedule of the same shape, at its steps 1 to STEPS."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    arguments = {
        "wsd": ("warmup_stable_decay", {"num_decay_steps": DECAY, "min_lr_ratio": LEAST, "decay_type": "linear"}),
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": LEAST}),
        "constant": ("constant_with_warmup", {}),
    }[kind]
    schedule = transformers.get_scheduler(arguments[0], optimizer, WARMUP, STEPS, arguments[1])
    factors = []
    for _ in range(STEPS):
        optimizer.step()
        schedule.step()
        factors.append(schedule.get_last_lr()[0])
    return factors


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
def test_learning_rates_equal_those_of_transformers(kind: str) -> None:
    ours = [learning_rate_factor(kind, step, STEPS, WARMUP, DECAY, LEAST) for step in range(1, STEPS + 1)]
    first = WARMUP - 1 if kind == "wsd" else 0  # transformers' wsd warms up from the least rate, ours from 0
    assert ours[first:] == pytest.approx(peers_factors(kind)[first:], abs=1e-12)


@pytest.mark.parametrize("kind", ["wsd", "cosine", "linear"])
def test_the_last_step_has_the_least_rate_and_none_passes_the_peak(kind: str) -> None:
    rates = [learning_rate_factor(kind, step, STEPS, WARMUP, DECAY, LEAST) for step in range(1, STEPS + 1)]
    assert math.isclose(rates[-1], LEAST)
    assert max(rates) == rates[WARMUP - 1] == 1.0
    assert rates[:WARMUP] == sorted(rates[:WARMUP])
    assert rates[WARMUP:] == sorted(rates[WARMUP:], reverse=True)


def test_norms_biases_and_embeddings_do_not_decay_and_every_parameter_is_in_one_group() -> None:
    config = Model(
        num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=2, head_dim=8, ffn_size=32, vocab_size=11,
        max_positions=8, position="learned", qkv_bias=True,
    )  # fmt: skip
    model = Transformer(config)
    optimizer = build_adamw(Optimizer(), list(model.named_parameters()))
    kept = {n for n, p in model.named_parameters() if not decays(n, p)}
    assert {"embedding.weight", "position_embedding.weight", "final_norm.weight"} <= kept
    assert all("norm" in n or "bias" in n or "embedding" in n for n in kept)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert all(len(optimizer.state[p]) == 3 for p in model.parameters()), "what a checkpoint is loaded into"
