"""A model on several tensor ranks, for tests that compare it with something else."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megalm.config.sections import Model
from megalm.model.init import initialise
from megalm.model.transformer import ModelInputs, Transformer
from megalm.ops.dropout import sequence_keys
from megalm.parallel.mesh import Axis, Layout, Mesh, build_mesh
from megalm.parallel.part import Part
from megalm.parallel.tensor.axis import TensorParallel
from megalm.parallel.weight_gradients import WeightGradientQueue

SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_size": 80,
    "vocab_size": 97, "max_positions": 64,
}  # fmt: skip
GPT = {
    "norm": "layernorm", "activation": "gelu", "position": "learned", "qkv_bias": True, "attention_bias": True,
    "ffn_bias": True, "num_kv_heads": 4, "tie_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """How a model is run."""

    changes: dict[str, Any] = field(default_factory=dict)
    sequence: bool = True
    overlap: int = 1
    deferred: bool = False
    recompute: str = "none"
    dtype: torch.dtype = torch.float64
    documents: int = 2
    compiled: bool = False
    seed: int = 3


def tensor_mesh(copies: int = 1) -> Mesh:
    """All ranks of the default group on the tensor axis."""
    layout, timeout = Layout(tensor=dist.get_world_size()), timedelta(seconds=60)
    return build_mesh(layout, torch.device("cpu"), timeout, copies)


def batch(vocabulary: int = 97, length: int = 32, sequences: int = 2, documents: int = 2) -> ModelInputs:
    """Sequences of one or two documents each."""
    total = length * sequences
    tokens_T = torch.randint(vocabulary, (total,), generator=torch.Generator().manual_seed(total))
    ends = [0] + [end for s in range(sequences) for end in (s * length + length // 3, (s + 1) * length)[-documents:]]
    positions_T = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(ends)])
    counted_T = torch.rand(total, generator=torch.Generator().manual_seed(1)) < 0.8
    keys_B = sequence_keys(11, torch.arange(sequences) + 40)
    return ModelInputs(
        tokens_T, positions_T, torch.tensor(ends, dtype=torch.int32), tokens_T.roll(-1), counted_T, keys_B
    )


def build(case: Case, tp: TensorParallel | None = None, **options: Any) -> Transformer:
    config = Model(**{**SHAPE, **case.changes})
    model = Transformer(config, case.dtype, case.recompute, tp=tp, **options)
    initialise(model, case.seed)
    if case.compiled:
        for block in model.layers.values():
            block.compile()
    return model.to(case.dtype)


@dataclass
class Result:
    """One rank's: its parts, and its values and gradients of them."""

    sums: list[float]
    parts: dict[str, Part]
    values: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def backward(model: Transformer, case: Case) -> Result:
    """A forward and a backward pass, and what belongs to it."""
    queue = model.tp.queue
    objective, cross_entropy = model(batch(documents=case.documents), scale=0.01)
    if case.deferred:
        assert queue is not None
        with queue.defer("W"):
            objective.backward()
        assert any(p.grad is None for p in model.parameters()), "something waits"
        queue.run("W")
    else:
        objective.backward()
    values = {name: p.detach() for name, p in model.named_parameters()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return Result([objective.item(), cross_entropy.item()], model.parts, values, gradients)


def on_tensor_ranks(case: Case) -> Result:
    """Run by each rank."""
    copies = max(1, dist.get_world_size() // case.changes.get("num_kv_heads", SHAPE["num_kv_heads"]))
    mesh = tensor_mesh(copies)
    tp = TensorParallel(mesh.tensor, case.sequence, case.overlap, WeightGradientQueue() if case.deferred else None)
    result = backward(build(case, tp), case)
    for name, part in result.parts.items():
        if part.partial:
            axis: Axis = mesh.tensor if part.copies == mesh.tensor.size else mesh.tensor_copies
            dist.all_reduce(result.gradients[name], group=axis.group)
    return result


def box(part: Part, whole: torch.Tensor) -> torch.Tensor:
    """What a rank holds of a whole parameter."""
    return whole[tuple(slice(o, o + s) for o, s in zip(part.offset, part.size, strict=True))]


def assert_same(ranks: list[Result], whole: Result, rtol: float, atol: float) -> None:
    """Sums, values and gradients of all ranks are those of the single process; padding is zero; each element has one
    primary copy."""
    held = {name: torch.zeros(value.shape) for name, value in whole.values.items()}
    for result in ranks:
        torch.testing.assert_close(result.sums, whole.sums, rtol=rtol, atol=0)
        assert result.parts.keys() == whole.values.keys() == result.values.keys()
        for name, part in result.parts.items():
            rows = part.size[0]
            assert torch.equal(result.values[name][:rows], box(part, whole.values[name])), name
            assert not result.values[name][rows:].any()
            assert not result.gradients[name][rows:].any()
            wanted = box(part, whole.gradients[name])
            torch.testing.assert_close(result.gradients[name][:rows], wanted, rtol=rtol, atol=atol, msg=name)
            box(part, held[name]).add_(part.primary)
    assert all((count == 1).all() for count in held.values())
