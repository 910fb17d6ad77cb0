"""A layout never changes the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layout_runs import Curve, all_layouts, assert_same, curve, larger, settings, stretch, trainer_of
from ranks import run_ranks
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megalm.train.signals import StopRequest

SCHEDULES = ("gpipe", "1f1b", "interleaved", "looped-bfs", "zb-h1", "interleaved-zb", "zbv", "dualpipev", "auto")
MODELS = {"untied": {"tie_embeddings": False}, "tied": {"tie_embeddings": True, "num_kv_heads": 4, "qk_norm": True}}


def pipeline(schedule: str, size: int, **others: Any) -> dict[str, Any]:
    return {"pipeline": {"size": size, "schedule": schedule}, **others}


SOME = [
    {"tensor": 4, "tensor_overlap": 2},
    {"tensor": 2, "sequence_sharding": False},
    {"data": 2, "zero": {"stage": 0}},
    {"data": 4, "zero": {"stage": 1, "shard": 2}},
    {"tensor": 2, "data": 2, "zero": {"stage": 2}},
    {"tensor": 2, "data": 2, "zero": {"stage": 3}},
    *(pipeline(schedule, 2) for schedule in SCHEDULES),
    pipeline("1f1b", 2, tensor=2, data=2, zero={"stage": 3}),
    pipeline("zbv", 2, data=2, zero={"stage": 2}),
    pipeline("interleaved-zb", 4),
    pipeline("interleaved", 2, data=4, zero={"stage": 2, "shard": 2}),
]
ALL = [
    *all_layouts(),
    *(pipeline(schedule, size) for schedule in SCHEDULES for size in (2, 4)),
    *(
        pipeline(schedule, 2, tensor=tensor, data=data, zero={"stage": stage})
        for schedule in SCHEDULES
        for tensor, data in ((1, 2), (2, 1), (2, 2), (1, 4))
        for stage in (range(4) if data > 1 else (1,))
    ),
]


def name_of(layout: dict[str, Any]) -> str:
    stage = layout.get("pipeline", {})
    zero = layout.get("zero", {})
    words = [f"{stage['schedule']}{stage['size']}"] if stage else []
    words += [f"{key}{layout[key]}" for key in ("tensor", "data") if key in layout]
    words += [f"{key}{value}" for key, value in zero.items()]
    return "-".join(words)


@pytest.fixture(scope="module")
def alone(data: Path) -> dict[str, Curve]:
    """What one process gives."""
    return {name: curve(settings(data, model)) for name, model in MODELS.items()}


@pytest.mark.parametrize("layout", SOME, ids=name_of)
def test_a_layout_gives_the_losses_and_norms_of_one_process(
    data: Path, alone: dict[str, Curve], layout: dict[str, Any]
) -> None:
    name = list(MODELS)[SOME.index(layout) % 2]
    assert_same(curve(larger(settings(data, MODELS[name]), layout), layout), alone[name], 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", ALL, ids=name_of)
def test_every_layout_gives_the_losses_and_norms_of_one_process(
    data: Path, alone: dict[str, Curve], layout: dict[str, Any], model: str
) -> None:
    assert_same(curve(larger(settings(data, MODELS[model]), layout), layout), alone[model], 1e-5)


@pytest.mark.parametrize("layout", [SOME[4], SOME[5], SOME[-4]], ids=name_of)
def test_in_bfloat16_layouts_stay_close(data: Path, layout: dict[str, Any]) -> None:
    raw = larger(settings(data, precision={"compute": "bfloat16"}), layout)  # alike on both sides, as they round alike
    assert_same(curve(raw, layout), curve(raw), 2e-2)


def test_everything_goes_together(data: Path) -> None:
    layout = pipeline("zbv", 2, data=2, zero={"stage": 3})
    raw = larger(settings(data, MODELS["tied"], precision={"compute": "bfloat16"}), layout)
    raw["run"] = raw["run"] | {"recompute": "full"}
    assert_same(curve(raw, layout), curve(raw), 2e-2)


@pytest.mark.parametrize("layout", [SOME[2], pipeline("zb-h1", 2, tensor=2, data=2)], ids=name_of)
def test_dropout_smoothing_recomputation_and_growing_batches_depend_on_no_layout(
    data: Path, layout: dict[str, Any]
) -> None:
    raw = settings(
        data,
        {"dropout": 0.1, "label_smoothing": 0.1, "z_loss": 1e-4},
        batch={"global_size": 8, "micro_size": 1, "ramp": {"start": 4, "increment": 4, "samples": 60}},
    )
    raw["run"] = raw["run"] | {"recompute": "selective"}
    assert_same(curve(raw, layout), curve(raw), 1e-5)


@pytest.mark.parametrize("layout", [SOME[3], pipeline("1f1b", 2, tensor=2)], ids=name_of)
def test_muon_takes_the_steps_of_one_process(data: Path, layout: dict[str, Any]) -> None:
    raw = larger(settings(data, optimizer={"kind": "muon", "learning_rate": 1e-3, "eps": 1e-5}), layout)
    assert_same(curve(raw, layout), curve(raw), 1e-4)


def test_a_run_of_muon_goes_on_under_another_layout(data: Path, tmp_path: Path) -> None:
    raw = settings(data, optimizer={"kind": "muon", "learning_rate": 1e-3, "eps": 1e-5})
    found: Curve = []
    for parallel in ({}, {"tensor": 2, "data": 2, "zero": {"stage": 3}}, pipeline("zbv", 2), {}):
        layout = {"data": 1, **parallel}
        ranks = layout["data"] * layout.get("tensor", 1) * layout.get("pipeline", {}).get("size", 1)
        found += run_ranks(ranks, stretch, raw | {"parallel": layout}, tmp_path, 5)[0]
    assert_same(found, curve(raw), 1e-4)


def copies_of_a_weight(raw: dict[str, Any]) -> float:
    """In how many places autograd keeps each of a rank's feed-forward matrices, all micro-batches being in flight."""
    trainer = trainer_of(raw)
    stages = trainer.parts.passes.stages.values()
    shape = raw["model"]["hidden_size"], raw["model"]["ffn_size"] // trainer.mesh.tensor.size
    places, kept = set(), []

    def keep(tensor: Tensor) -> Tensor:
        if shape in (tensor.shape, tensor.shape[::-1]):
            places.add(tensor.untyped_storage().data_ptr())
            kept.append(tensor)  # its memory is not used again
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.step(trainer.stream(), StopRequest())
    return len(places) / sum(3 * len(stage.layers) for stage in stages)


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"data": 2}])
def test_micro_batches_in_flight_share_one_narrow_copy_of_the_weights(data: Path, parallel: dict[str, Any]) -> None:
    layout = {**pipeline("gpipe", 2), "data": 1, **parallel}
    raw = settings(data, {"hidden_size": 64, "ffn_size": 96}, precision={"compute": "bfloat16"}, parallel=layout)
    size = 2 * parallel.get("tensor", 1) * parallel.get("data", 1)
    assert run_ranks(size, copies_of_a_weight, raw) == [1] * size
