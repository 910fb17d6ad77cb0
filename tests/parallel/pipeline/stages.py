"""A small transformer in stages on this rank, run by the executor, for tests in several ranks."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megalm.config.sections import Model, Zero
from megalm.model.init import initialise
from megalm.model.transformer import ModelInputs, Recompute, Stage, Transformer
from megalm.parallel.mesh import Layout, build_mesh
from megalm.parallel.pipeline.executor import Executor
from megalm.parallel.pipeline.p2p import warm_up
from megalm.parallel.pipeline.plan import Placement, Schedule, placement_of
from megalm.parallel.pipeline.planner import plan_schedule
from megalm.parallel.pipeline.recording import Recording
from megalm.parallel.pipeline.tied import add_tied_gradients
from megalm.parallel.tensor.axis import TensorParallel
from megalm.parallel.weight_gradients import WeightGradientQueue
from megalm.parallel.zero.fsdp import shard_stage
from megalm.parallel.zero.sync import GradientSync

HIDDEN, VOCABULARY, LENGTH = 16, 40, 8
TWO_RANKS = Layout(pipeline=2)


@dataclass(frozen=True)
class Case:
    schedule: Schedule = "1f1b"
    layout: Layout = TWO_RANKS
    chunks: int = 1
    micro_batches: int = 4
    tied: bool = False
    layers: int = 8
    zero_stage: int = 1
    recompute: Recompute = "none"
    cut: tuple[int, ...] | None = None
    """Layers of each stage; alike if not given."""

    @property
    def placement(self) -> Placement:
        return placement_of(self.schedule, self.layout.pipeline, self.chunks)

    @property
    def config(self) -> Model:
        return Model(
            num_layers=self.layers, hidden_size=HIDDEN, num_heads=4, num_kv_heads=2, head_dim=4, ffn_size=24,
            vocab_size=VOCABULARY, max_positions=LENGTH, tie_embeddings=self.tied,
        )  # fmt: skip


def micro_batch(number: int, length: int = LENGTH) -> ModelInputs:
    """Two sequences in which not all tokens count, different for each number."""
    generator = torch.Generator().manual_seed(number)
    tokens_T = torch.randint(VOCABULARY, (2 * length,), generator=generator)
    ends = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    counted_T = torch.rand(2 * length, generator=generator) < 0.8
    return ModelInputs(tokens_T, torch.arange(length).repeat(2), ends, tokens_T.roll(-1), counted_T)


def whole_gradients(case: Case, batch: list[ModelInputs]) -> tuple[dict[str, Tensor], float]:
    """Of one process and plain autograd, and the sum of the losses."""
    model = Transformer(case.config, torch.float64)
    initialise(model.double(), 0)
    losses = 0.0
    for inputs in batch:
        objective, _ = model(inputs, scale=1 / 64)
        objective.backward()
        losses += objective.item()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, losses


class Pipeline:
    """What this rank has of the model."""

    def __init__(self, case: Case, timeout: float = 60) -> None:
        self.case = case
        self.mesh = build_mesh(case.layout, torch.device("cpu"), timedelta(seconds=timeout))
        warm_up(self.mesh)
        self.queue = WeightGradientQueue()
        tp = TensorParallel(self.mesh.tensor, sequence=self.mesh.tensor.size > 1, queue=self.queue)
        self.models = {
            stage: self._stage(stage, tp)
            for stage, rank in enumerate(case.placement)
            if rank == self.mesh.pipeline.rank
        }
        self.syncs: dict[int, GradientSync] = {stage: self._sync(model) for stage, model in self.models.items()}
        self.losses: dict[int, float] = {}

    def _stage(self, stage: int, tp: TensorParallel) -> Transformer:
        stages = len(self.case.placement)
        cut = self.case.cut or (self.case.layers // stages,) * stages
        first = sum(cut[:stage])
        part = Stage(first, first + cut[stage], stage == 0, stage == stages - 1)
        model = Transformer(self.case.config, torch.float64, self.case.recompute, tp, part).double()
        initialise(model, 0)
        return model

    def _sync(self, model: Transformer) -> GradientSync:
        return shard_stage(model, self.mesh, Zero(stage=self.case.zero_stage), torch.float64)  # type: ignore[arg-type]

    def executor(self, micro_batches: int | None = None, forward_only: bool = False) -> Executor:
        case = self.case
        plan = plan_schedule(
            case.schedule, case.layout.pipeline, case.chunks, micro_batches or case.micro_batches,
            tied=case.tied and not forward_only, forward_only=forward_only,
        )  # fmt: skip
        ends = [self.models[s] for s in (0, len(case.placement) - 1) if s in self.models]
        copies = [model.embedding.weight for model in ends if model.embedding is not None]
        return Executor(
            plan[self.mesh.pipeline.rank],
            self.syncs,
            case.placement,
            self.mesh,
            self.queue,
            torch.float64,
            partial(
                add_tied_gradients,
                copies,
                self.mesh.pipeline,
                (case.placement[0], case.placement[-1]),
                self.mesh.device,
            ),
        )

    def step(self, executor: Executor, batch: list[ModelInputs], recording: Recording | None = None) -> None:
        self.losses.clear()

        def forward(stage: int, number: int, x: Tensor | None) -> Tensor:
            output = self.models[stage](batch[number], x, scale=1 / 64)
            if isinstance(output, tuple):
                self.losses[number] = output[0].item()
                return output[0]
            return output

        tensor = self.mesh.tensor.size
        executor.step(forward, [(len(i.tokens_T) // tensor, HIDDEN) for i in batch], recording)

    def gradients(self) -> dict[str, Tensor]:
        """By name, as far as they are here; summed over tensor ranks where each has that of its own rows or heads."""
        found = {}
        for model in self.models.values():
            for name, parameter in model.named_parameters():
                grad, part = parameter.grad, model.parts[name]
                assert grad is not None, f"{name} has no gradient"
                grad = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
                if part.partial and part.copies > 1:
                    dist.all_reduce(grad, group=self.mesh.tensor.group)
                found[name] = grad
        return found

    def forget_gradients(self) -> None:
        for model in self.models.values():
            model.zero_grad()

    def mine(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of gradients of whole parameters, what this rank has."""
        parts = {name: part for model in self.models.values() for name, part in model.parts.items()}
        boxes = {
            name: tuple(slice(o, o + s) for o, s in zip(part.offset, part.size, strict=True))
            for name, part in parts.items()
        }
        return {name: whole[name][box] for name, box in boxes.items()}
