"""What a rank holds of a tensor, and how it is cut for writing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from megalm.checkpoint.manifest import Region

BOX_BYTES = 64 << 20  # who needs a part of a box reads all of it, for its checksum


@dataclass(frozen=True)
class Shard:
    """A box of a tensor, on this rank. `tensor` may be larger in any dim: what is more is neither saved nor loaded."""

    name: str
    tensor: torch.Tensor
    """Local and plain, on any device, with any strides."""
    shape: tuple[int, ...]
    """Of the whole tensor, the same under every layout."""
    offset: tuple[int, ...]
    """Where this box begins."""
    size: tuple[int, ...]
    """Of this box; 0 in a dim if this rank holds nothing of it."""
    primary: bool = True
    """Whether this rank saves it; exactly one of those that hold the same elements must. All of them load it."""

    def __post_init__(self) -> None:
        dims = zip(self.offset, self.size, self.shape, self.tensor.shape, strict=True)
        fits = all(start + length <= whole and length <= local for start, length, whole, local in dims)
        assert fits, f"{self.name}: {self.size} from {self.offset} of {self.shape}, held as {self.tensor.shape}"

    @property
    def region(self) -> Region:
        return Region(self.offset, self.size)

    @property
    def data(self) -> torch.Tensor:
        """A view of the tensor without padding."""
        return self.tensor.detach()[tuple(slice(length) for length in self.size)]

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")


def whole(tensors: Mapping[str, torch.Tensor]) -> list[Shard]:
    """Tensors that this process holds alone."""
    return [
        Shard(name, tensor, tuple(tensor.shape), (0,) * tensor.dim(), tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def cut(region: Region, limit: int) -> Iterator[Region]:
    """`region` in pieces of at most `limit` elements: in order, each of them contiguous in the row-major region."""
    if region.volume <= limit:
        yield region
        return
    dim = next(dim for dim, length in enumerate(region.size) if length > 1)
    length = region.size[dim]
    rows = max(1, limit // (region.volume // length))
    for start in range(0, length, rows):
        offset, size = list(region.offset), list(region.size)
        offset[dim] += start
        size[dim] = min(rows, length - start)
        yield from cut(Region(tuple(offset), tuple(size)), limit)
