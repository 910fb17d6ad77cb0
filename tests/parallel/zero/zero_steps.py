"""A model's gradients under ZeRO and in one process, for tests that compare them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megalm.config.sections import Model, Zero
from megalm.model.init import initialise
from megalm.model.transformer import ModelInputs, Transformer
from megalm.parallel.mesh import Layout, Mesh, build_mesh
from megalm.parallel.tensor.axis import TensorParallel
from megalm.parallel.weight_gradients import WeightGradientQueue
from megalm.parallel.zero.fsdp import shard_stage
from megalm.parallel.zero.sync import GradientSync

SHAPE: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "ffn_size": 40,
    "vocab_size": 37, "max_positions": 16, "qkv_bias": True,
}  # fmt: skip
MICRO_BATCHES = 3  # a data rank


@dataclass(frozen=True)
class Case:
    """How a model is run."""

    stage: int
    replicate: int = 1
    shard: int = 2
    order: str = "F0 B0 F1 B1 F2 B2"
    """Of the micro-batches' forward, backward, input-gradient and weight-gradient passes."""
    compute: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    recompute: str = "none"
    offload: str = "none"
    length: int = 16
    """Of a micro-batch, in tokens."""
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        if self.stage == 0:
            return Layout(data_replicate=self.replicate * self.shard)
        return Layout(data_replicate=self.replicate, data_shard=self.shard)


def micro_batch(number: int, length: int) -> ModelInputs:
    """The same for every layout."""
    tokens_T = torch.randint(SHAPE["vocab_size"], (length,), generator=torch.Generator().manual_seed(number))
    counted_T = torch.arange(length) < length - number % 3
    ends = torch.tensor([0, length // 4, length], dtype=torch.int32)
    positions_T = torch.cat([torch.arange(length // 4), torch.arange(length - length // 4)])
    return ModelInputs(tokens_T, positions_T, ends, tokens_T.roll(-1), counted_T)


def counted(ranks: int, length: int) -> int:
    return sum(int(micro_batch(i, length).counted_T.sum()) for i in range(ranks * MICRO_BATCHES))


def build(case: Case, tp: TensorParallel | None = None) -> Transformer:
    model = Transformer(Model(**SHAPE | case.changes), case.compute, case.recompute, tp)  # type: ignore[arg-type]
    initialise(model, 5)
    return model.to(case.dtype)


def data_mesh(case: Case) -> Mesh:
    return build_mesh(case.layout, torch.device("cpu"), timedelta(seconds=60))


def sharded(case: Case, mesh: Mesh) -> tuple[Transformer, WeightGradientQueue, GradientSync]:
    queue = WeightGradientQueue()
    model = build(case, TensorParallel(queue=queue))
    return model, queue, shard_stage(model, mesh, Zero(stage=case.stage, offload=case.offload), case.compute)  # type: ignore[arg-type]


def run_step(
    case: Case, model: Transformer, queue: WeightGradientQueue, sync: GradientSync, rank: int, ranks: int
) -> float:
    """One step in the case's order, as an executor would do it; this rank's nats."""
    passes = case.order.split()
    losses: dict[int, Tensor] = {}
    nats, scale = 0.0, 1 / counted(ranks, case.length)
    sync.begin()
    for place, action in enumerate(passes):
        kind, i = action[0], int(action[1:])
        last = not any(later[0] in "BW" for later in passes[place + 1 :])
        if kind == "F":
            losses[i], loss = model(micro_batch(rank * MICRO_BATCHES + i, case.length), scale=scale)
            nats += loss.item()
        elif kind == "W":
            queue.run(i)
            sync.after_weights(last)
        else:
            sync.before_backward(last, kind == "I")
            with queue.defer(i) if kind == "I" else nullcontext():
                losses.pop(i).backward()
    sync.reduce()
    sync.finish()
    return nats


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def zero_gradients(case: Case) -> tuple[float, dict[str, Tensor]]:
    """On each rank: its nats, and all gradients, whole."""
    mesh = data_mesh(case)
    model, queue, sync = sharded(case, mesh)
    nats = run_step(case, model, queue, sync, mesh.data.rank, mesh.data.size)
    return nats, {
        name: whole(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def plain_gradients(case: Case) -> tuple[float, dict[str, Tensor]]:
    """The same by autograd alone, in one process."""
    model, ranks, nats = build(case), case.layout.size, 0.0
    for i in range(ranks * MICRO_BATCHES):
        objective, loss = model(micro_batch(i, case.length), scale=1 / counted(ranks, case.length))
        objective.backward()
        nats += loss.item()
    return nats, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative to the largest entry of each gradient."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in theirs)
