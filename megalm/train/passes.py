"""A step's forward and backward passes through all stages, wherever they are: plan -> executor -> stages.

The plan depends on the number of micro-batches, which a batch ramp changes and evaluation has its own of; each plan is
made, and checked, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megalm.config.sections import Pipeline, known
from megalm.model.transformer import ModelInputs, Transformer
from megalm.parallel.mesh import Mesh
from megalm.parallel.pipeline.executor import Executor, Forward
from megalm.parallel.pipeline.p2p import Buffers
from megalm.parallel.pipeline.planner import plan_schedule
from megalm.parallel.pipeline.recording import Recording
from megalm.parallel.pipeline.tied import add_tied_gradients
from megalm.parallel.zero.sync import GradientSync, NoSync
from megalm.train.stages import Stages


class Passes:
    """The stages on this rank, by number, and how micro-batches go through them."""

    def __init__(
        self,
        stages: Mapping[int, Transformer],
        syncs: Mapping[int, GradientSync],
        mesh: Mesh,
        pipeline: Pipeline,
        plan: Stages,
        calls: Mapping[int, Callable[..., Any]] | None = None,
    ) -> None:
        """`plan` has all stages, `stages` those of this rank; `calls`: what to call in their place, if it is not
        they."""
        self.stages, self.syncs, self.mesh, self._calls = stages, syncs, mesh, calls or stages
        self.pipeline, self.plan = pipeline, plan
        self._any = next(iter(stages.values()))
        self._buffers = Buffers(self._any.compute, mesh.device)
        self._executors: dict[tuple[int, bool], Executor] = {}

    @classmethod
    def of(cls, model: Transformer) -> Passes:
        """A whole model in one process."""
        mesh = Mesh(device=next(model.parameters()).device)
        return cls({0: model}, {0: NoSync()}, mesh, Pipeline(chunks=1), Stages.whole(model.config.num_layers))

    @property
    def predicts(self) -> bool:
        """Whether this rank is the one, of those that hold the last stage, whose sums over its tokens count."""
        return self.plan.placement[-1] == self.mesh.pipeline.rank and self.mesh.tensor.rank == 0

    def run(self, batches: Sequence[ModelInputs], scale: float | None, recording: Recording | None = None) -> Tensor:
        """Takes micro-batches forward, and with a `scale` of the objective backward: the gradients, sums over the data
        ranks, are then in the parameters' `.grad`. Returns the cross-entropy of this data rank's micro-batches in nats,
        float64, on the ranks of the last stage, and 0 on the others."""
        nats = torch.zeros((), dtype=torch.float64, device=self.mesh.device)

        def forward(number: int, micro_batch: int, x_RD: Tensor | None) -> Tensor:
            output = self._calls[number](batches[micro_batch], x_RD, scale=scale or 1.0)
            if isinstance(output, Tensor):
                return output
            objective, cross_entropy = output
            nats.add_(cross_entropy)
            return objective

        self._step(forward, batches, scale is None, recording)
        return nats

    def read(self, batches: Sequence[ModelInputs], take: Callable[[int, Transformer, Tensor], None]) -> None:
        """Takes micro-batches without labels forward; on the ranks of the last stage `take` gets each one's number,
        that stage and its output x_TD. Not with sequence sharding, which wants numbers of tokens that divide."""
        assert not self._any.tp.shards_rows, "documents may be of any length"

        def forward(number: int, micro_batch: int, x_TD: Tensor | None) -> Tensor:
            x_TD = self._calls[number](batches[micro_batch], x_TD)
            if (stage := self.stages[number]).stage.predicts:
                take(micro_batch, stage, x_TD)
            return x_TD

        self._step(forward, batches, True)

    def _step(
        self,
        forward: Forward,
        batches: Sequence[ModelInputs],
        forward_only: bool,
        recording: Recording | None = None,
    ) -> None:
        shapes = [(len(self._any.tp.local_rows(b.tokens_T)), self._any.config.hidden_size) for b in batches]
        self._executor(len(batches), forward_only).step(forward, shapes, recording)

    def _executor(self, micro_batches: int, forward_only: bool) -> Executor:
        key = micro_batches, forward_only
        if key not in self._executors:
            tied, chunks = self._any.config.tie_embeddings, known(self.pipeline.chunks)
            plan = plan_schedule(
                self.pipeline.schedule,
                self.mesh.pipeline.size,
                chunks,
                micro_batches,
                self.plan.costs,
                None if forward_only else self.plan.memory_cap,
                tied=tied,
                forward_only=forward_only,
            )
            self._executors[key] = Executor(
                plan[self.mesh.pipeline.rank],
                self.syncs,
                self.plan.placement,
                self.mesh,
                self._any.tp.queue,
                self._any.compute,
                self._add_tied,
                self._buffers,
            )
        return self._executors[key]

    def _add_tied(self) -> None:
        ends = self.plan.placement[0], self.plan.placement[-1]
        copies = [s.output.weight for s in self.stages.values() if s.stage.embeds or s.stage.predicts]
        add_tied_gradients(copies, self.mesh.pipeline, ends, self.mesh.device)
