"""A run that is saved under one layout goes on under any other, as if it had never stopped."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from layout_runs import STEPS, Curve, assert_same, larger, settings, steps_of, trainer_of
from ranks import run_ranks

from megalm.checkpoint import read_manifest
from megalm.train.signals import StopRequest

BEFORE = 4
MODELS = {
    "untied": {"num_layers": 4, "tie_embeddings": False},
    "tied": {"num_layers": 4, "tie_embeddings": True, "num_kv_heads": 4, "qk_norm": True},
}


def pipeline(schedule: str, size: int, **others: Any) -> dict[str, Any]:
    return {"pipeline": {"size": size, "schedule": schedule}, **others}


LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "tensor 2": {"tensor": 2},
    "replicas 2": {"data": 2, "zero": {"stage": 0}},
    "hybrid 2 x 2": {"data": 4, "zero": {"stage": 1, "shard": 2}},
    "ZeRO-3 of 3": {"data": 3, "zero": {"stage": 3}},
    "tensor 2, ZeRO-2": {"tensor": 2, "data": 2, "zero": {"stage": 2}},
    "1f1b, tensor 2": pipeline("1f1b", 2, tensor=2),
    "interleaved": pipeline("interleaved", 2),
    "zbv, ZeRO-3": pipeline("zbv", 2, data=2, zero={"stage": 3}),
    "zb-h1 of 4": pipeline("zb-h1", 4),
}
NAMES = list(LAYOUTS)
# Each is saved under and loaded into with three others, and two with themselves, bit for bit.
SOME = [(name, NAMES[(at + far) % len(NAMES)]) for far in (1, 3, 6) for at, name in enumerate(NAMES)]
SOME += [("ZeRO-3 of 3", "ZeRO-3 of 3"), ("zbv, ZeRO-3", "zbv, ZeRO-3")]


def settings_of(data: Path, model: str, name: str) -> tuple[dict[str, Any], int]:
    """A config for a layout, and its number of ranks."""
    layout = {"data": 1, **LAYOUTS[name]}
    raw = settings(data, MODELS[model], schedule={"steps": BEFORE + STEPS, "warmup_steps": 2}, parallel=layout)
    raw["batch"] = {"global_size": 12, "micro_size": 1}
    stages = layout.get("pipeline", {}).get("size", 1)
    return larger(raw, layout), layout.get("tensor", 1) * layout["data"] * stages


def interrupted(raw: dict[str, Any], directory: Path, goes_on: bool) -> tuple[Curve, str]:
    """A rank's part of a run that saves in the background after a few steps, and its steps from there on."""
    trainer = trainer_of(raw, directory)
    stream = trainer.stream()
    for _ in range(BEFORE):
        trainer.step(stream, StopRequest())
    trainer._save(None)
    lines = [trainer.step(stream, StopRequest()) for _ in range(STEPS)] if goes_on else []
    trainer._commit()
    trainer.saver.close()
    return [(line["loss"], line["grad_norm"]) for line in lines], trainer.position.data_hash


def resumed(raw: dict[str, Any], directory: Path) -> tuple[Curve, str]:
    trainer = trainer_of(raw, directory)
    assert trainer.position.step == BEFORE
    return steps_of(trainer), trainer.position.data_hash


class Runs:
    """Saves each layout once."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder = data, folder
        self.saved = cache(self._saved)

    def _saved(self, model: str, name: str, goes_on: bool) -> tuple[Path, Curve, str]:
        raw, ranks = settings_of(self.data, model, name)
        directory = self.folder / f"{model} {name} {goes_on}"
        answers = run_ranks(ranks, interrupted, raw, directory, goes_on)
        assert all(answer == answers[0] for answer in answers)
        files = read_manifest(directory / "checkpoints" / f"step-{BEFORE:08d}").files.values()
        assert len(files) == ranks, "all ranks write"
        return directory, *answers[0]

    def check(self, model: str, saved: str, loaded: str) -> None:
        same = saved == loaded
        directory, curve, data_hash = self.saved(model, saved, same or saved == "alone")
        if not same:
            _, curve, data_hash = self.saved(model, "alone", True)
        raw, ranks = settings_of(self.data, model, loaded)
        answers = run_ranks(ranks, resumed, raw, directory)
        assert all(answer == answers[0] for answer in answers)
        assert answers[0][1] == data_hash, "the same samples"
        if same:
            assert answers[0][0] == curve, "bit for bit"
        assert_same(answers[0][0], curve)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(data, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize(("saved", "loaded"), SOME, ids=str)
def test_a_run_goes_on_under_another_layout_as_if_it_had_never_stopped(runs: Runs, saved: str, loaded: str) -> None:
    runs.check("tied", saved, loaded)


@pytest.mark.full
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("saved", "loaded"), list(product(LAYOUTS, LAYOUTS)), ids=str)
def test_a_run_goes_on_under_every_layout(runs: Runs, saved: str, loaded: str, model: str) -> None:
    runs.check(model, saved, loaded)
