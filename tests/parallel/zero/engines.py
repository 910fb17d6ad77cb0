"""The same few steps of training in one process, as it is written in torch's manual, and under DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from parallel.tensor.layouts import SHAPE, batch

from megalm.config import Config
from megalm.config.deepspeed import engine_settings
from megalm.config.load import resolve
from megalm.model.init import fill, initialise
from megalm.model.transformer import ModelInputs, Transformer
from megalm.optim.adamw import build_adamw, decays
from megalm.parallel.mesh import Axis, Layout, Mesh, build_mesh
from megalm.parallel.part import Part
from megalm.parallel.tensor.axis import TensorParallel
from megalm.parallel.zero.deepspeed import DeepSpeedStage, Piece

MICRO_BATCHES = 4  # a step
LENGTH = 16
CLIP = 0.5
MODEL = {key: value for key, value in SHAPE.items() if key not in ("head_dim", "max_positions")}


@dataclass(frozen=True)
class Run:
    """What is trained, and how."""

    layout: Layout = field(default_factory=Layout)
    stage: int = 1
    offload: str = "none"
    compute: str = "float32"
    recompute: str = "none"
    steps: int = 20
    model: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        data = self.layout.data
        return resolve(
            {
                "run": {"dir": "unused", "recompute": self.recompute},
                "model": {**MODEL, **self.model},
                "tokenizer": {"path": "byte"},
                "data": {"sequence_length": LENGTH, "sources": [{"name": "a", "path": "unused"}]},
                "batch": {"global_size": MICRO_BATCHES, "micro_size": 1},
                "parallel": {
                    "tensor": self.layout.tensor,
                    "data": data,
                    "zero": {"engine": "deepspeed", "stage": self.stage, "offload": self.offload},
                },
                "optimizer": {"learning_rate": 3e-3, "clip_norm": CLIP},
                "schedule": {"steps": self.steps},
                "precision": {"compute": self.compute},
                "deepspeed": self.deepspeed,
            },
            self.layout.size,
        )


@dataclass
class Curve:
    """Loss and gradient norm of every step, and what this rank has at the end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    state: dict[str, list[Piece]] = field(default_factory=dict)


def micro_batches(step: int) -> list[ModelInputs]:
    """Those of a step: sequences of two documents, with other tokens each time."""
    made = []
    for i in range(MICRO_BATCHES):
        inputs = batch(length=LENGTH, sequences=1)
        generator = torch.Generator().manual_seed(step * MICRO_BATCHES + i)
        tokens_T = torch.randint(97, (LENGTH,), generator=generator) // 3
        made.append(inputs._replace(tokens_T=tokens_T, labels_T=tokens_T.roll(-1), keys_B=None))
    return made


def learning_rate(step: int) -> float:
    return 3e-3 / (1 + step / 10)


def compute_type(run: Run) -> torch.dtype:
    return torch.float32 if run.compute == "float32" else torch.bfloat16


def build(run: Run, tp: TensorParallel | None = None) -> Transformer:
    return Transformer(run.config.model, compute_type(run), run.recompute, tp)  # type: ignore[arg-type]


def train_alone(run: Run) -> tuple[Curve, dict[str, torch.Tensor]]:
    """In one process, on torch alone; what a checkpoint would hold, too."""
    model = build(run)
    initialise(model, seed=3)
    optimizer = build_adamw(run.config.optimizer, model)
    curve = Curve()
    for step in range(run.steps):
        inputs = micro_batches(step)
        counted = sum(int(i.counted_T.sum()) for i in inputs)
        nats = 0.0
        for each in inputs:
            objective, cross_entropy = model(each, scale=1 / counted)
            objective.backward()
            nats += cross_entropy.item()
        curve.losses.append(nats / counted)
        curve.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
    held = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        held |= {f"{kind}.{name}": optimizer.state[p][kind] for kind in ("exp_avg", "exp_avg_sq", "step")}
    return curve, held


def mesh_of(run: Run) -> Mesh:
    if run.layout.size == 1:
        dist.destroy_process_group()  # as in a process that nobody launched
        return Mesh()
    copies = max(1, run.layout.tensor // run.config.model.num_kv_heads)  # type: ignore[operator]
    return build_mesh(run.layout, torch.device("cpu"), timedelta(seconds=60), copies)


def build_stage(run: Run, mesh: Mesh, seed: int = 3) -> DeepSpeedStage:
    """The engine, with the initial weights of `seed`."""
    model = build(run, TensorParallel(mesh.tensor, sequence=True))
    optimizer = run.config.optimizer
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": optimizer.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, optimizer.learning_rate, optimizer.betas, optimizer.eps, fused=True)
    stage = DeepSpeedStage(model, adamw, model.parts, mesh, engine_settings(run.config))
    for piece in stage.masters():
        fill(piece.tensor, model.config, seed, piece.name, Part(piece.shape, piece.offset, piece.size))
    stage.publish()
    return stage


def train_step(stage: DeepSpeedStage, step: int, curve: Curve) -> None:
    mesh = stage.mesh
    inputs = micro_batches(step)
    counted = sum(int(i.counted_T.sum()) for i in inputs)
    mine = inputs[mesh.data.rank :: mesh.data.size]
    sums = torch.zeros(2, dtype=torch.float64)
    stage.begin()
    for i, each in enumerate(mine):
        objective, cross_entropy = stage(each, scale=1 / counted)
        stage.before_backward(last=i == len(mine) - 1, deferred=False)
        objective.backward()
        sums[0] += cross_entropy.double() / mesh.tensor.size
    stage.reduce()
    stage.finish()
    gradients = stage.gradients()
    for piece in gradients:
        part = stage.parts[piece.name]
        if part.partial:
            axis: Axis = mesh.tensor if part.copies == mesh.tensor.size else mesh.tensor_copies
            dist.all_reduce(piece.tensor, group=axis.group)
    sums[1] = sum(piece.tensor.double().square().sum() for piece in gradients if piece.primary)
    if mesh.layout.size > 1:
        dist.all_reduce(sums)
    curve.losses.append(sums[0].item() / counted)
    curve.norms.append(sums[1].sqrt().item())
    for piece in gradients:
        piece.tensor.mul_(min(1.0, CLIP / (curve.norms[-1] + 1e-6)))
    for group in stage.optimizer.param_groups:
        group["lr"] = learning_rate(step)
    stage.step()


def train_under_deepspeed(run: Run) -> Curve:
    """Run by each rank."""
    stage = build_stage(run, mesh_of(run))
    curve = Curve()
    for step in range(run.steps):
        train_step(stage, step, curve)
    curve.state = held(stage)
    return curve


def held(stage: DeepSpeedStage) -> dict[str, list[Piece]]:
    return {
        "model": stage.masters(),
        "exp_avg": stage.moments("exp_avg"),
        "exp_avg_sq": stage.moments("exp_avg_sq"),
        "step": stage.steps(),
    }


def whole(ranks: list[Curve]) -> Iterator[tuple[str, torch.Tensor]]:
    """What all ranks hold, put together; an element that none or several hold for saving is not a number."""
    values: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for kind, pieces in rank.state.items():
            for piece in pieces:
                name = f"{kind}.{piece.name}"
                place = tuple(slice(a, a + n) for a, n in zip(piece.offset, piece.size, strict=True))
                target = values.setdefault(name, torch.zeros(piece.shape))
                count = counts.setdefault(name, torch.zeros(piece.shape))
                if piece.primary:
                    target[place] += piece.tensor
                    count[place] += 1
    for name, value in values.items():
        yield name, torch.where(counts[name] == 1, value, torch.nan)


def continue_under_deepspeed(run: Run, start: int, values: dict[str, torch.Tensor]) -> Curve:
    """Run by each rank: from step `start`, with what `values` hold, by the names that `whole` gives."""
    stage = build_stage(run, mesh_of(run), seed=4)
    for kind, pieces in held(stage).items():
        for piece in pieces:
            place = tuple(slice(a, a + n) for a, n in zip(piece.offset, piece.size, strict=True))
            piece.tensor.copy_(values[f"{kind}.{piece.name}"][place])
    stage.publish()
    curve = Curve()
    for step in range(start, run.steps):
        train_step(stage, step, curve)
    curve.state = held(stage)
    return curve


def score_in_between(run: Run) -> list[tuple[list[float], list[float]]]:
    """Run by each rank: a few steps with a forward pass for evaluation before each, and without."""
    found = []
    for scored in (False, True):
        stage = build_stage(run, mesh_of(run))
        curve = Curve()
        for step in range(3):
            if scored:
                with torch.no_grad():
                    _, nats = stage(micro_batches(99)[0])
                assert nats > 0
            train_step(stage, step, curve)
        found.append((curve.losses, curve.norms))
    return found
