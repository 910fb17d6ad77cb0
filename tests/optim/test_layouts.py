"""Optimizer steps under tensor and ZeRO sharding against one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor, nn

from megalm.config.sections import Model, Optimizer, Zero
from megalm.model.counts import parameter_count
from megalm.model.init import initialise
from megalm.model.transformer import ModelInputs, Transformer
from megalm.optim.build import build_optimizer
from megalm.optim.gradients import Totals, clip, sum_copies, totals
from megalm.optim.muon import Muon, cost, orthogonal, owners, rounds
from megalm.parallel.mesh import Layout, Mesh, build_mesh
from megalm.parallel.tensor.axis import TensorParallel
from megalm.parallel.zero.fsdp import shard_stage
from megalm.parallel.zero.regions import local, regions

SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "ffn_size": 24,
    "vocab_size": 37, "max_positions": 16, "qkv_bias": True, "qk_norm": True,
}  # fmt: skip
LIMIT = 0.05


@dataclass(frozen=True)
class Case:
    kind: str = "adamw"
    stage: int = 1
    layout: Layout = field(default_factory=Layout)
    steps: int = 3
    offload: str = "none"
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    norms: list[float]
    zeros: list[int | None]
    sums: list[tuple[float, ...]]
    parameters: int
    boxes: dict[str, tuple[tuple[int, ...], tuple[int, ...], Tensor]]
    """Of primary regions: offset, size and values after the last step."""


def inputs(number: int) -> ModelInputs:
    tokens_T = torch.randint(37, (16,), generator=torch.Generator().manual_seed(number))
    ends = torch.tensor([0, 16], dtype=torch.int32)
    return ModelInputs(tokens_T, torch.arange(16), ends, tokens_T.roll(-1), torch.ones(16, dtype=torch.bool))


def train(case: Case) -> Outcome:
    """Some steps on four micro-batches each, shared by the data ranks."""
    mesh, config = Mesh(), Model(**SHAPE | case.changes)
    if dist.is_initialized():
        copies = max(1, case.layout.tensor // SHAPE["num_kv_heads"])
        mesh = build_mesh(case.layout, torch.device("cpu"), timedelta(seconds=60), copies)
    model = Transformer(config, torch.float64, tp=TensorParallel(mesh.tensor, sequence=mesh.tensor.size > 1))
    initialise(model, 5)
    model.double()
    zero = Zero(stage=case.stage, offload=case.offload)  # type: ignore[arg-type]
    sync = shard_stage(model, mesh, zero, torch.float64)
    held = regions(model, model.parts, mesh)
    settings = Optimizer(kind=case.kind, learning_rate=1e-2)  # type: ignore[arg-type]
    optimizer = build_optimizer(settings, held, mesh)
    found: list[Totals] = []
    share = 4 // mesh.data.size
    for step in range(case.steps):
        sync.begin()
        for i in range(share):
            objective, _ = model(inputs(4 * step + share * mesh.data.rank + i), scale=1 / 64)
            sync.before_backward(i == share - 1, False)
            objective.backward()
        sync.reduce()
        sync.finish()
        sum_copies(held, mesh)
        found.append(totals(held, mesh, [float(mesh.rank), torch.tensor(0.25)], zeros=True))
        clip(held, found[-1].norm, LIMIT)
        optimizer.step()
        optimizer.zero_grad()
    boxes = {r.name: (r.offset, r.size, r.box(r.parameter).clone()) for r in held if r.primary and r.count}
    counts = sum(region.count for region in held if region.primary)
    return Outcome([t.norm for t in found], [t.zeros for t in found], [t.sums for t in found], counts, boxes)


def assemble(outcomes: list[Outcome], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Whole parameters from all ranks' boxes, which must cover each exactly once."""
    whole = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name, shape in shapes.items()}
    for outcome in outcomes:
        for name, (offset, size, values) in outcome.boxes.items():
            place = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
            assert whole[name][place].isnan().all(), f"{name}: counted twice"
            whole[name][place] = values
    return whole


def check(case: Case, tolerance: float) -> None:
    outcomes = run_ranks(case.layout.size, train, case)
    alone = train(Case(case.kind, steps=case.steps, changes=case.changes))
    for outcome in outcomes:
        assert outcome.norms == outcomes[0].norms, "the same on every rank to the bit"
        assert outcome.norms == pytest.approx(alone.norms, rel=1e-10)
        assert outcome.zeros == alone.zeros
        size = case.layout.size
        assert outcome.sums == [(size * (size - 1) / 2, size / 4)] * case.steps
    config = Model(**SHAPE | case.changes)
    assert sum(outcome.parameters for outcome in outcomes) == parameter_count(config, 37) == alone.parameters
    shapes = {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}
    ours, theirs = assemble(outcomes, shapes), assemble([alone], shapes)
    for name in shapes:
        difference = (ours[name] - theirs[name]).norm() / theirs[name].norm()
        assert difference < tolerance, f"{name}: {difference}"


LAYOUTS = [Layout(tensor=2), Layout(data_shard=2), Layout(data_shard=2, tensor=2), Layout(tensor=4)]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_takes_the_same_steps(kind: str, layout: Layout) -> None:
    check(Case(kind, 1, layout), 1e-9)


@pytest.mark.parametrize(
    ("stage", "layout"),
    [(0, Layout(data_replicate=2)), (2, Layout(data_replicate=2, data_shard=2)), (3, Layout(data_shard=2, tensor=2))],
)
def test_every_zero_stage_takes_the_same_steps_with_muon(stage: int, layout: Layout) -> None:
    check(Case("muon", stage, layout, changes={"tie_embeddings": True}), 1e-9)


def test_parameters_that_rest_on_the_host_take_the_same_steps() -> None:
    check(Case("adamw", 3, Layout(data_shard=2), offload="cpu"), 1e-9)


def test_one_process_takes_the_steps_of_torchs_muon() -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = nn.ModuleDict({"layers": nn.ModuleDict({"0": nn.Linear(24, 40, bias=False)})})
    weight = blocks["layers"]["0"].weight  # type: ignore[index, union-attr]
    other = nn.Parameter(weight.detach().clone())
    config = Optimizer(kind="muon", learning_rate=1e-2)
    ours = Muon(config, regions(blocks, {}, Mesh()), Mesh())
    theirs = torch.optim.Muon([other], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        weight.grad = torch.randn(weight.shape, generator=generator)
        other.grad = weight.grad.clone()
        before = other.detach().clone()
        ours.step()
        theirs.step()
        moved, expected = weight.detach() - before, other.detach() - before
        # torch's is computed in bfloat16.
        assert (moved - expected).norm() < 2e-2 * expected.norm()
        with torch.no_grad():
            other.copy_(weight)


def test_singular_values_are_brought_close_to_one() -> None:
    matrix = torch.randn(30, 70, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert 0.5 < values.min() < values.max() < 1.5


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), max_size=40), st.integers(1, 8))
def test_matrices_are_shared_so_that_nobody_has_much_more_to_do(shapes: list[tuple[int, int]], ranks: int) -> None:
    costs = [cost(*shape) for shape in shapes]
    owner = owners(costs, ranks)
    load = [sum(c for c, o in zip(costs, owner, strict=True) if o == rank) for rank in range(ranks)]
    # Graham's bound for the dearest first.
    best = max([sum(costs) / ranks, *costs])
    assert max(load) <= (4 / 3) * best + max(costs, default=0) / 3
    done = [matrix for row in rounds(owner, ranks) for matrix in row if matrix is not None]
    assert sorted(done) == list(range(len(shapes)))
    for row in rounds(owner, ranks):
        assert all(matrix is None or owner[matrix] == rank for rank, matrix in enumerate(row))


def test_clipping_scales_as_torchs_does() -> None:
    layer = nn.Linear(5, 7)
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    copies = [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]
    held = regions(layer, {}, Mesh())
    found = totals(held, Mesh())
    clip(held, found.norm, 0.5)
    ours = [local(region.parameter.grad) for region in held if region.parameter.grad is not None]
    for parameter, gradient in zip(layer.parameters(), copies, strict=True):
        parameter.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
    assert found.norm == pytest.approx(norm.item())
    for mine, theirs in zip(ours, layer.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.grad)
