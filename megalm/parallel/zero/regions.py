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
    """A box of a whole parameter, and this rank's tensor that holds it."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    offset: tuple[int, ...]
    size: tuple[int, ...]
    """The first may be 0."""
    primary: bool
    """Whether this rank is the one, of those that hold the same box, that counts and saves it."""
    tensor: Tensor
    """The local shard; its first `size[0]` rows are the box, the others padding."""

    @property
    def count(self) -> int:
        return prod(self.size)

    def box(self, tensor: Tensor) -> Tensor:
        """The same rows of a tensor like `tensor`: a gradient, a moment."""
        return local(tensor)[: self.size[0]] if self.size else local(tensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter, or of its gradient; writing to it writes to the parameter."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_rows(rows: int, shards: int, rank: int) -> tuple[int, int]:
    """First and last (exclusive) of the rows that `rank` of `shards` holds."""
    chunk = -(-rows // shards)
    return min(rank * chunk, rows), min((rank + 1) * chunk, rows)


def regions(module: nn.Module, parts: Mapping[str, Part], mesh: Mesh) -> dict[str, Region]:
    """For each parameter of a stage, at rest, by name: this rank's region. `parts`: what the tensor axis left of each
    (one that is not named is whole)."""
    found = {}
    for name, parameter in module.named_parameters():
        part = parts.get(name) or Part.whole(*parameter.shape)
        rows = parameter.shape[0]
        first, last = (
            shard_rows(rows, mesh.data_shard.size, mesh.data_shard.rank)
            if isinstance(parameter, DTensor)
            else (0, rows)
        )
        tensor = local(parameter)
        assert len(tensor) == last - first, f"{name}: {len(tensor)} rows here, not {last - first}"
        used = max(0, min(last, part.size[0]) - first)
        found[name] = Region(
            part.shape,
            (part.offset[0] + min(first, part.size[0]), *part.offset[1:]),
            (used, *part.size[1:]),
            part.primary and mesh.data_replicate.rank == 0,
            tensor,
        )
    return found
