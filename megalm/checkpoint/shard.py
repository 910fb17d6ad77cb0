"""What a rank holds of a tensor, and which boxes of it this rank writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from megalm.checkpoint.manifest import Region

BOXES = 1 << 16  # at which a manifest is still small
BOX_BYTES = 4 << 20, 64 << 20  # least and most of a large one: who needs a part reads all of it, for its checksum


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
    """Whether this rank saves it; all load it. Of those that hold the same elements exactly one must, or:"""
    copy: tuple[int, int] = (0, 1)
    """Which of how many ranks this is that hold the same shards, in the same order, and share the saving."""

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


def box_bytes(total: int) -> int:
    """How large a box of a checkpoint of `total` bytes may be."""
    least, most = BOX_BYTES
    return min(max(least, total // BOXES), most)


def spread(shards: Iterable[Shard], limit: int) -> list[Shard]:
    """The boxes that this rank saves, each of at most `limit` bytes or one element: of what several ranks hold, each
    box is saved by the one that has the fewest bytes so far, as all of them reckon alike."""
    loads: dict[int, list[int]] = {}
    mine = []
    for shard in shards:
        if not shard.primary or (not shard.region.volume and 0 not in shard.shape):
            continue
        (number, copies), width = shard.copy, shard.tensor.element_size()
        load = loads.setdefault(copies, [0] * copies)
        for region in cut(shard.region, max(1, limit // width)):
            writer = load.index(min(load))
            load[writer] += region.volume * width
            if writer == number:
                data = shard.data[region.within(shard.region)]
                mine.append(replace(shard, tensor=data, offset=region.offset, size=region.size))
    return mine


def cut(region: Region, limit: int) -> Iterator[Region]:
    """`region` in pieces of at most `limit` elements: halved across its longest dim, again and again, so that whoever
    needs some rows, or some columns, meets few pieces."""
    if region.volume <= limit:
        yield region
        return
    length = max(region.size)
    dim, half = region.size.index(length), -(-length // 2)
    for start, part in ((0, half), (half, length - half)):
        offset, size = list(region.offset), list(region.size)
        offset[dim] += start
        size[dim] = part
        yield from cut(Region(tuple(offset), tuple(size)), limit)
