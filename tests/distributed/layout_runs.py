"""Short training runs in several ranks, for tests that compare layouts."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks

from megalm.config import resolve
from megalm.launch.ranks import Process
from megalm.train.build import build_inputs
from megalm.train.signals import StopRequest
from megalm.train.trainer import Trainer

STEPS = 20
Curve = list[tuple[float, float]]


def settings(data: Path, model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> dict[str, Any]:
    """A config for eight layers with grouped-query attention, on documents of uneven lengths."""
    shape = {"num_layers": 8, "hidden_size": 32, "num_heads": 8, "num_kv_heads": 2, "ffn_size": 64}
    return {
        "run": {"dir": str(data / "nowhere"), "device": "cpu", "timeout": 60.0},
        "model": shape | (model or {}),
        "tokenizer": {"path": "byte"},
        "data": {
            "sequence_length": 32,
            "sources": [{"name": name, "path": str(data / name)} for name in ("a", "b")],
            "validation": {"samples": 2},
        },
        "batch": {"global_size": 8, "micro_size": 1},
        "schedule": {"steps": STEPS, "warmup_steps": 2},
        "optimizer": {"learning_rate": 1e-3, "eps": 1e-5},
        "log": {"tensorboard": False},
    } | sections


def trainer_of(raw: dict[str, Any], directory: Path | None = None) -> Trainer:
    """This rank's; without a `directory` it must not save."""
    config = resolve(raw, dist.get_world_size())
    inputs = build_inputs(config, Process(dist.get_rank(), dist.get_rank(), dist.get_world_size()))
    trainer = Trainer(inputs, directory or Path(config.run.dir))
    trainer.peak = 1.0
    return trainer


def steps_of(trainer: Trainer, steps: int = STEPS) -> Curve:
    stream = trainer.stream()
    lines = [trainer.step(stream, StopRequest()) for _ in range(steps)]
    stream.close()
    return [(line["loss"], line["grad_norm"]) for line in lines]


def losses_and_norms(raw: dict[str, Any]) -> Curve:
    """One rank's part of a run, without a directory."""
    return steps_of(trainer_of(raw))


def stretch(raw: dict[str, Any], directory: Path, steps: int) -> Curve:
    """One rank's part of some steps of a run, which goes on from the checkpoint in its directory and ends with one."""
    trainer = trainer_of(raw, directory)
    curve = steps_of(trainer, steps)
    trainer._finish_saving(None)
    return curve


def larger(raw: dict[str, Any], parallel: dict[str, Any]) -> dict[str, Any]:
    """With larger micro-batches, which change nothing, either, and are quicker: two for each data rank, or twice as
    many as there are stages."""
    batches = parallel.get("data", 1) * 2 * parallel.get("pipeline", {}).get("size", 1)
    return raw | {"batch": raw["batch"] | {"micro_size": max(1, raw["batch"]["global_size"] // batches)}}


def curve(raw: dict[str, Any], parallel: dict[str, Any] | None = None) -> Curve:
    """The losses and gradient norms of a run under a layout, which all ranks must agree on."""
    parallel = parallel or {}
    data = parallel.get("data", 1)
    size = parallel.get("tensor", 1) * data * parallel.get("pipeline", {}).get("size", 1)
    first, *others = run_ranks(size, losses_and_norms, raw | {"parallel": parallel | {"data": data}})
    assert all(other == first for other in others)
    return first


def assert_same(ours: Curve, theirs: Curve, tolerance: float = 1e-5) -> None:
    assert len({loss for loss, _ in theirs}) == len(theirs), "it trains"
    for step, (line, wanted) in enumerate(zip(ours, theirs, strict=True), 1):
        assert line == pytest.approx(wanted, rel=tolerance), f"step {step}"


def all_layouts() -> list[dict[str, Any]]:
    """Every (tensor, data_shard, data_replicate, stage) of at most 8 ranks, stages without data ranks left out."""
    sizes = (1, 2, 4, 8)
    found = []
    for tensor, shard, replicate, stage in product(sizes, sizes, sizes, range(4)):
        data = shard * replicate
        if 1 < tensor * data <= 8 and (data > 1 or stage == 1) and (stage > 0 or shard == 1):
            found.append({"tensor": tensor, "data": data, "zero": {"stage": stage, "shard": shard}})
    return found
