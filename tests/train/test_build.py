"""What a run's parts need, before they are made."""

from __future__ import annotations

from typing import Any

import pytest

from megalm.config import resolve
from megalm.model.counts import parameter_count
from megalm.train.build import bytes_of_a_rank


def rank_bytes(ranks: int, **parallel: Any) -> tuple[int, int]:
    """Bytes of a rank, and parameters of the whole model."""
    raw = {
        "run": {"dir": "nowhere"},
        "model": {"num_layers": 8, "hidden_size": 64, "num_heads": 4, "ffn_size": 128, "vocab_size": 512},
        "tokenizer": {"path": "byte"},
        "data": {"sequence_length": 32, "sources": [{"name": "a", "path": "a"}]},
        "batch": {"global_size": 16, "micro_size": 1},
        "schedule": {"steps": 10},
        "parallel": parallel,
    }
    config = resolve(raw, ranks)
    return bytes_of_a_rank(config), parameter_count(config.model, 512)


@pytest.mark.parametrize(
    ("parallel", "share"),
    [
        ({}, 4 + 4 + 8),
        ({"data": 8, "zero": {"stage": 0}}, 4 + 4 + 4 + 8),  # and what FSDP computes with
        ({"data": 8, "zero": {"stage": 1}}, 4 + 4 + 12 / 8),  # gathered parameters and gradients are whole
        ({"data": 8, "zero": {"stage": 2}}, 4 + 16 / 8),
        ({"data": 8, "zero": {"stage": 2, "shard": 2}}, 4 + 16 / 2),
        ({"tensor": 2, "pipeline": {"size": 4}}, 16 / 8),
    ],
)
def test_a_rank_needs_what_its_layout_leaves_it(parallel: dict[str, Any], share: float) -> None:
    needed, parameters = rank_bytes(8 if parallel else 1, **parallel)
    assert needed == pytest.approx(share * parameters, rel=0.01)


def test_with_stage_3_a_rank_holds_two_layers_whole_at_a_time() -> None:
    least, parameters = rank_bytes(8, data=8, zero={"stage": 3})
    assert 16 / 8 * parameters < least < rank_bytes(8, data=8, zero={"stage": 2})[0]
