"""A run's steps against a plain loop over transformers' Llama, and between settings that must not matter."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peers import llama
from runs import read_metrics, write_config

from megalm.cli import main
from megalm.config import load_config
from megalm.train.build import build_inputs, build_parts

STEPS, WARMUP, DECAY, PEAK, LEAST, CLIP, WEIGHT_DECAY = 12, 4, 4, 5e-3, 0.1, 0.5, 0.3
OVERRIDES = [
    f"schedule={{kind: wsd, steps: {STEPS}, warmup_steps: {WARMUP}, decay_steps: {DECAY}, min_ratio: {LEAST}}}",
    f"optimizer={{learning_rate: {PEAK}, clip_norm: {CLIP}, weight_decay: {WEIGHT_DECAY}, betas: [0.8, 0.9]}}",
    "batch={global_size: 8, micro_size: 4}",
    "checkpoint.every=100",
]


def train(config: str, *overrides: str) -> list[dict[str, Any]]:
    """The step lines of a run with these settings."""
    run = Path(config).with_suffix("")
    assert main(["train", config, *overrides]) == 0
    return [line for line in read_metrics(run) if "kind" not in line]


def documents(tokens_S: torch.Tensor, eod: int) -> list[slice]:
    """Where each document's part of a sequence lies, its end-of-document token included."""
    ends = [i + 1 for i, token in enumerate(tokens_S.tolist()) if token == eod]
    bounds = sorted({0, *ends, len(tokens_S)})
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def factor(step: int) -> float:
    if step <= WARMUP:
        return step / WARMUP
    return 1 - (1 - LEAST) * max(0, step - (STEPS - DECAY)) / DECAY


@pytest.mark.parametrize("document_attention", [True, False])
def test_losses_and_gradient_norms_equal_those_of_a_plain_loop_over_transformers(
    data: Path, tmp_path: Path, document_attention: bool
) -> None:
    overrides = [*OVERRIDES, f"model.document_attention={str(document_attention).lower()}"]
    path = write_config(data, tmp_path / "run")
    lines = train(path, *overrides)

    inputs = build_inputs(load_config(path, overrides))
    eod = inputs.tokenizer.eod
    model = build_parts(inputs).passes.stages[0]
    peer = llama(inputs.config.model, dict(model.named_parameters()))
    matrices = [m.weight for m in peer.modules() if isinstance(m, torch.nn.Linear)]
    rest = [p for p in peer.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-8, foreach=False)
    uneven = set()
    for step, line in enumerate(lines, 1):
        batch = inputs.loader.micro_batch(8 * (step - 1), 8)
        nats, counted = torch.zeros(()), 0
        for tokens_S, labels_S in zip(
            torch.from_numpy(batch.tokens_T).view(8, -1), torch.from_numpy(batch.labels_T).view(8, -1), strict=True
        ):
            parts = documents(tokens_S, eod) if document_attention else [slice(0, len(tokens_S))]
            for part in parts:
                logits_SV = peer(tokens_S[None, part]).logits[0]
                wanted_S = labels_S[part].clone()
                if document_attention:
                    wanted_S[tokens_S[part] == eod] = -100
                nats = nats + F.cross_entropy(logits_SV, wanted_S, reduction="sum", ignore_index=-100)
                counted += int((wanted_S != -100).sum())
        uneven.add(counted)
        (nats / counted).backward()
        norm = torch.stack([p.grad.double().square().sum() for p in peer.parameters()]).sum().sqrt().item()
        assert line["loss"] == pytest.approx(nats.item() / counted, rel=2e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert line["learning_rate"] == pytest.approx(PEAK * factor(step), rel=1e-12)
        for parameter in peer.parameters():
            parameter.grad *= min(1.0, CLIP / norm)
        for group in optimizer.param_groups:
            group["lr"] = PEAK * factor(step)
        optimizer.step()
        optimizer.zero_grad()
    assert max(line["grad_norm"] for line in lines) > CLIP, "clipping takes part"
    assert (len(uneven) > 1) == document_attention, "masks are uneven"


@pytest.mark.parametrize("ramp", ["null", "{start: 4, increment: 2, samples: 30}"])
def test_the_size_of_micro_batches_changes_nothing(data: Path, tmp_path: Path, ramp: str) -> None:
    curves = {}
    for micro in (1, 2):
        path = write_config(data, tmp_path / f"micro-{micro}")
        lines = train(path, *OVERRIDES, f"batch={{global_size: 8, micro_size: {micro}, ramp: {ramp}}}")
        curves[micro] = [(line["tokens"], line["loss"], line["grad_norm"]) for line in lines]
    for one, two in zip(curves[1], curves[2], strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_what_drops_out_depends_on_the_sample_and_not_on_its_micro_batch(data: Path, tmp_path: Path) -> None:
    curves = []
    for number, changes in enumerate(("micro_size: 1", "micro_size: 4", "micro_size: 4", "micro_size: 4")):
        rate = 0.0 if number == 3 else 0.3
        settings = [f"batch={{global_size: 8, {changes}}}", f"model.dropout={rate}", "schedule.steps=9"]
        if number == 2:
            settings.append("run.recompute=full")
        lines = train(write_config(data, tmp_path / f"run-{number}"), *OVERRIDES, *settings)
        curves.append([(line["loss"], line["grad_norm"]) for line in lines])
    for one, four in zip(curves[0], curves[1], strict=True):
        assert one == pytest.approx(four, rel=1e-4)
    assert curves[1] == curves[2]
    assert curves[1][0][0] != pytest.approx(curves[3][0][0], rel=1e-6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit_of_a_run(data: Path, tmp_path: Path, recompute: str) -> None:
    curves = [
        [
            (line["loss"], line["grad_norm"])
            for line in train(write_config(data, tmp_path / mode), *OVERRIDES, f"run.recompute={mode}")
        ]
        for mode in ("none", recompute)
    ]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_compiled_run_stays_close_to_an_eager_one(data: Path, tmp_path: Path, recompute: str) -> None:
    curves = []
    for compiled in ("false", "true"):
        path = write_config(data, tmp_path / f"compiled-{compiled}")
        settings = [
            f"run.compile={compiled}",
            f"run.recompute={recompute}",
            "schedule.steps=3",
            "schedule.decay_steps=1",
        ]
        curves.append([line["loss"] for line in train(path, "schedule.warmup_steps=1", *settings)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
