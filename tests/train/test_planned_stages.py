"""Which layers a run's stages have: by the model's operations, by what a run has measured, and under a memory cap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalm.config import resolve
from megalm.config.sections import Config
from megalm.errors import UserError
from megalm.parallel.pipeline.planner import plan_schedule
from megalm.parallel.pipeline.simulate import simulate
from megalm.train.stages import plan_stages


def config(pipeline: dict[str, Any], layers: int = 8) -> Config:
    shape = {"num_layers": layers, "hidden_size": 32, "num_heads": 4, "ffn_size": 64, "vocab_size": 64}
    raw = {
        "run": {"dir": "nowhere"},
        "model": shape,
        "tokenizer": {"path": "byte"},
        "data": {"sequence_length": 32, "sources": [{"name": "a", "path": "a"}]},
        "batch": {"global_size": 16, "micro_size": 1},
        "schedule": {"steps": 10},
        "parallel": {"pipeline": pipeline},
    }
    return resolve(raw, pipeline["size"])


def record(directory: Path, layers: list[int], layer: float, embedding: float, head: float) -> None:
    """A run whose layers, embedding and head took so long forward, and twice as long backward."""
    last = len(layers) - 1
    ranks = []
    for stage, count in enumerate(layers):
        time = layer * count + embedding * (stage == 0) + head * (stage == last)
        spans = [("F", 0.0, time), ("B", time, 3 * time)]
        ranks.append([{"action": f"{op}{stage}.0", "start": start, "end": end} for op, start, end in spans])
    content = {"schedule": "1f1b", "placement": list(range(len(layers))), "layers": layers, "micro_batches": 1}
    (directory / "timeline.json").write_text(json.dumps(content | {"bytes": 0, "ranks": ranks}))


def layers_of(pipeline: dict[str, Any]) -> list[int]:
    return [end - first for first, end in plan_stages(config(pipeline)).bounds]


def test_measured_costs_share_out_the_layers(tmp_path: Path) -> None:
    assert layers_of({"size": 4}) == [2, 2, 2, 2]
    record(tmp_path, [2, 2, 2, 2], layer=0.010, embedding=0.010, head=0.020)
    plan = plan_stages(config({"size": 4, "costs_from": str(tmp_path)}))
    assert plan.bounds[-1] == (7, 8)
    assert max(plan.costs.forward) == pytest.approx(0.03)
    assert sum(plan.costs.forward) == pytest.approx(8 * 0.01 + 0.03)
    assert plan.costs.input_gradient == pytest.approx(plan.costs.forward)
    assert plan.costs.weight_gradient == pytest.approx(plan.costs.forward)


def test_the_head_is_known_even_of_two_stages(tmp_path: Path) -> None:
    record(tmp_path, [4, 4], layer=0.010, embedding=0.0, head=0.020)
    assert layers_of({"size": 2, "costs_from": str(tmp_path)}) == [5, 3]
    assert layers_of({"size": 4, "costs_from": str(tmp_path)}) in ([2, 2, 3, 1], [2, 3, 2, 1], [3, 2, 2, 1])


def test_costs_that_are_not_there_or_of_another_model_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"timeline\.json does not exist: train with log\.timeline=true"):
        plan_stages(config({"size": 2, "costs_from": str(tmp_path)}))
    record(tmp_path, [4, 4], 0.01, 0.0, 0.0)
    with pytest.raises(
        UserError, match=r"is of a model with num_layers=8, and model\.num_layers=4: name a run of this"
    ):
        plan_stages(config({"size": 2, "costs_from": str(tmp_path)}, layers=4))
    record(tmp_path, [4, 4], 0.01, 0.0, 0.0)
    (tmp_path / "config.yaml").write_text("model: {num_layers: 8, hidden_size: 64, z_loss: 0.1}")
    with pytest.raises(UserError, match=r"is of a model with hidden_size=64, and model\.hidden_size=32: name a run"):
        plan_stages(config({"size": 2, "costs_from": str(tmp_path)}))


@pytest.mark.parametrize(("schedule", "keeps", "too_low"), [("1f1b", 4, 1.9), ("zbv", 4, 2.5), ("gpipe", 16, 15.5)])
def test_a_schedule_that_keeps_more_than_the_cap_is_refused(schedule: str, keeps: int, too_low: float) -> None:
    assert plan_stages(config({"size": 4, "schedule": schedule, "memory_cap": float(keeps)})).memory_cap
    with pytest.raises(UserError, match=r"memory_cap: no partition|activations take [\d.]+ at once, more than the cap"):
        plan_stages(config({"size": 4, "schedule": schedule, "memory_cap": too_low}))


def test_the_stages_that_keep_most_micro_batches_give_layers_to_the_others_under_a_cap() -> None:
    layers = layers_of({"size": 4, "memory_cap": 2.0})  # 1f1b keeps 4, 3, 2 and 1 micro-batches of these stages
    assert layers == [1, 1, 2, 4]
    plan = plan_stages(config({"size": 4, "memory_cap": 2.0}))
    made = plan_schedule("1f1b", 4, 1, 16, plan.costs)
    assert max(simulate(made, plan.placement, plan.costs).peaks) <= 2.0


def test_auto_keeps_to_the_cap_and_uses_what_it_gives() -> None:
    spans = {}
    for cap in (4.0, 8.0):
        plan = plan_stages(config({"size": 4, "schedule": "auto", "memory_cap": cap}))
        made = plan_schedule("auto", 4, 1, 16, plan.costs, plan.memory_cap)
        simulation = simulate(made, plan.placement, plan.costs)
        assert max(simulation.peaks) <= cap * (1 + 1e-9)
        spans[cap] = simulation.makespan
    assert spans[8.0] < spans[4.0]
