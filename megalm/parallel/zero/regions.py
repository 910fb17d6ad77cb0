"""Where this rank's shard of each parameter lies in the whole parameter.

    whole parameter  --tensor axis-->  this rank's Part  --data axis, rows-->  this rank's Region

FSDP cuts the first dim of what the tensor axis left into chunks of ceil(rows / ranks) rows; the last ranks may have
fewer, or none. Rows that pad a vocabulary lie past the part's end and belong to no region.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megalm.parallel.mesh import Mesh
from megalm.parallel.part import Part


@dataclass(frozen=True)
class Region:
    """A box of a whole parameter, which this rank's shard begins with; the shard's other rows are padding."""

    name: str
    parameter: nn.Parameter
    """At rest: under FSDP a DTensor."""
    part: Part
    """What the tensor axis left of it."""
    offset: tuple[int, ...]
    size: tuple[int, ...]
    """The first may be 0."""
    primary: bool
    """Whether this rank is the one, of those that hold the same box, that counts it."""

    @property
    def count(self) -> int:
        return prod(self.size)

    def box(self, tensor: Tensor) -> Tensor:
        """The region's own elements of the parameter, of its gradient or of a moment; writing to it writes to them."""
        return local(tensor)[: self.size[0]]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter, or of its gradient; writing to it writes to the parameter."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_rows(rows: int, shards: int, rank: int) -> tuple[int, int]:
    """First and last (exclusive) of the rows that `rank` of `shards` holds."""
    chunk = -(-rows // shards)
    return min(rank * chunk, rows), min((rank + 1) * chunk, rows)


def regions(module: nn.Module, parts: Mapping[str, Part], mesh: Mesh) -> list[Region]:
    """This rank's region of each parameter of a stage at rest. `parts`: what the tensor axis left of each, by name (one
    that is not named is whole)."""
    found = []
    for name, parameter in module.named_parameters():
        part, rows = parts.get(name) or Part.whole(*parameter.shape), parameter.shape[0]
        first, last = 0, rows
        if isinstance(parameter, DTensor):
            first, last = shard_rows(rows, mesh.data_shard.size, mesh.data_shard.rank)
        first, last = min(first, part.size[0]), min(last, part.size[0])
        offset, size = (part.offset[0] + first, *part.offset[1:]), (last - first, *part.size[1:])
        primary = part.primary and mesh.data_replicate.rank == 0
        found.append(Region(name, parameter, part, offset, size, primary))
    return found
