"""DeepSpeed's engine under the trainer: it changes nothing of a run, either."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from layout_runs import Curve, assert_same, curve, larger, losses_and_norms, settings, stretch
from ranks import RankError, run_ranks

from megalm.config import resolve
from megalm.errors import UserError
from megalm.launch.ranks import Process
from megalm.train.build import build_inputs
from megalm.train.signals import StopRequest
from megalm.train.trainer import Trainer

pytest.importorskip("deepspeed", reason="the package deepspeed is not installed")

UNTIED: dict[str, Any] = {}
TIED = {"tie_embeddings": True, "qk_norm": True, "vocab_size": 259}
GPT = {
    "norm": "layernorm", "activation": "gelu", "position": "learned", "qkv_bias": True, "attention_bias": True,
    "ffn_bias": True, "num_kv_heads": 1,
}  # fmt: skip


def layout(tensor: int, data: int, stage: int, offload: str = "none", engine: str = "deepspeed") -> dict[str, Any]:
    return {"tensor": tensor, "data": data, "zero": {"engine": engine, "stage": stage, "offload": offload}}


@pytest.fixture(scope="module")
def alone(data: Path) -> dict[str, Curve]:
    """What one process gives, on torch alone."""
    return {
        "untied": curve(settings(data, UNTIED)),
        "tied": curve(settings(data, TIED)),
        "gpt": curve(settings(data, GPT)),
    }


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("untied", layout(1, 2, 1)),
        ("tied", layout(2, 2, 2)),
        ("gpt", layout(2, 2, 3, "cpu")),
        ("untied", layout(1, 1, 2, "cpu")),
    ],
    ids=str,
)
def test_every_step_is_that_of_one_process(
    data: Path, alone: dict[str, Curve], name: str, parallel: dict[str, Any]
) -> None:
    model = {"untied": UNTIED, "tied": TIED, "gpt": GPT}[name]
    assert_same(curve(larger(settings(data, model), parallel), parallel), alone[name])


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize(("tensor", "ranks"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)])
@pytest.mark.parametrize("name", ["untied", "tied", "gpt"])
def test_every_layout_is_that_of_one_process(
    data: Path, alone: dict[str, Curve], name: str, tensor: int, ranks: int, offload: str, stage: int
) -> None:
    model = {"untied": UNTIED, "tied": TIED, "gpt": GPT}[name]
    assert_same(curve(settings(data, model), layout(tensor, ranks, stage, offload)), alone[name])


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.full) for stage in (2, 3))])
def test_bfloat16_comes_close(data: Path, stage: int) -> None:
    raw = larger(settings(data, precision={"compute": "bfloat16"}), layout(2, 2, stage))
    assert_same(curve(raw, layout(2, 2, stage)), curve(raw), 2e-2)


@pytest.mark.full
@pytest.mark.parametrize(("stage", "recompute"), [(2, "selective"), (3, "full")])
@pytest.mark.parametrize("persistent", [0, 100_000])
def test_recomputation_and_gathering_of_small_parameters_change_nothing(
    data: Path, alone: dict[str, Curve], stage: int, recompute: str, persistent: int
) -> None:
    raw = settings(data)
    raw["run"]["recompute"] = recompute
    raw["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": persistent}}
    assert_same(curve(raw, layout(2, 2, stage)), alone["untied"])


def test_a_run_goes_on_under_the_other_engine_and_another_layout(
    data: Path, alone: dict[str, Curve], tmp_path: Path
) -> None:
    found: Curve = []
    for parallel in (
        layout(1, 2, 2, engine="fsdp"),
        layout(2, 2, 3),
        layout(1, 4, 1, "cpu"),
        layout(2, 1, 1, engine="fsdp"),
    ):
        ranks = parallel["tensor"] * parallel["data"]
        found += run_ranks(ranks, stretch, settings(data, parallel=parallel), tmp_path, 5)[0]
    assert_same(found, alone["untied"])


def scored_in_between(raw: dict[str, Any]) -> list[Curve]:
    """One rank's: a few steps without and with an evaluation before each."""
    config = resolve(raw, dist.get_world_size())
    found = []
    for scored in (False, True):
        inputs = build_inputs(config, Process(dist.get_rank(), dist.get_rank(), dist.get_world_size()))
        trainer = Trainer(inputs, Path(config.run.dir))
        trainer.peak = 1.0
        stream, curve = trainer.stream(), []
        for _ in range(3):
            if scored:
                trainer._evaluate(None)
            line = trainer.step(stream, StopRequest())
            curve.append((line["loss"], line["grad_norm"]))
        stream.close()
        found.append(curve)
    return found


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.full), 2, pytest.param(3, marks=pytest.mark.full)])
def test_evaluation_between_the_steps_changes_nothing(data: Path, stage: int) -> None:
    for without, scored in run_ranks(2, scored_in_between, settings(data, parallel=layout(1, 2, stage))):
        assert without == scored


def test_without_the_package_the_mend_is_named_before_a_start(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'megalm\[deepspeed\]'"):
        build_inputs(resolve(settings(data, parallel=layout(1, 1, 1)), 1))


def test_what_deepspeed_itself_refuses_is_one_line(data: Path) -> None:
    raw = settings(data, parallel=layout(1, 1, 1), deepspeed={"zero_optimization": {"reduce_bucket_size": "many"}})
    with pytest.raises(RankError, match=r"UserError: deepspeed: .*reduce_bucket_size.*\n"):
        run_ranks(1, losses_and_norms, raw)
