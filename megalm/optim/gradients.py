"""From gradients that data parallelism has summed to gradients that the optimizer may use: what tensor ranks hold in
copies is summed, then the norm, the count of zeros and the step's other sums come from one all-reduce of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.parallel.collectives import start_joint_sum
from megalm.parallel.mesh import Axis, Mesh
from megalm.parallel.zero.regions import Region, local


@dataclass(frozen=True)
class Totals:
    """Of the whole model, the same on every rank to the bit."""

    norm: float
    """Of the gradient."""
    zeros: int | None
    """Entries of the gradient that are zero, if they were counted."""
    sums: tuple[float, ...]
    """Of what else was given."""


@torch.no_grad()
def sum_copies(held: Sequence[Region], mesh: Mesh) -> None:
    """Adds up the gradients of parameters that several tensor ranks hold and each knows its own share of: one
    all-reduce for those that all ranks hold, one for those that neighbours hold."""
    partial = [region for region in held if region.part.partial and region.part.copies > 1]
    everywhere = [region for region in partial if region.part.copies == mesh.tensor.size]
    neighbours = [region for region in partial if region.part.copies < mesh.tensor.size]
    _sum(everywhere, mesh.tensor, mesh.device)
    _sum(neighbours, mesh.tensor_copies, mesh.device)


def _sum(held: Sequence[Region], axis: Axis, device: torch.device) -> None:
    gradients = [local(r.parameter.grad) for r in held if r.parameter.grad is not None]
    if axis.size == 1 or not gradients:
        return
    start_joint_sum(gradients, axis, device)()


@torch.no_grad()
def totals(held: Sequence[Region], mesh: Mesh, sums: Sequence[Tensor | float] = (), zeros: bool = False) -> Totals:
    """`held`: the regions of all this rank's stages; each entry of the gradient counts once, padding never. `sums`:
    scalars, on the ranks that have them (0 elsewhere). Sums are in float64; the host waits once."""
    boxes = [r.box(r.parameter.grad) for r in held if r.primary and r.parameter.grad is not None]
    boxes = [box for box in boxes if box.numel()]
    vector = torch.zeros(2 + len(sums), dtype=torch.float64, device=mesh.device)
    if boxes:
        norms = torch._foreach_norm(boxes, 2.0, dtype=torch.float64)
        vector[0] = torch.stack(norms).square().sum()
    if zeros and boxes:
        vector[1] = torch.stack([box.numel() - box.count_nonzero() for box in boxes]).sum()
    for place, value in enumerate(sums, 2):
        vector[place] = value
    if mesh.world.size > 1:
        dist.all_reduce(vector, group=mesh.world.group)
    square, zero_count, *others = vector.tolist()
    return Totals(square**0.5, int(zero_count) if zeros else None, tuple(others))


@torch.no_grad()
def clip(held: Sequence[Region], norm: float, limit: float) -> None:
    """Scales gradients of the global norm `norm` down to `limit` (by torch's rule, limit / (norm + 1e-6))."""
    factor = limit / (norm + 1e-6)
    gradients = [local(r.parameter.grad) for r in held if r.parameter.grad is not None]
    if factor < 1 and gradients:
        torch._foreach_mul_(gradients, factor)
