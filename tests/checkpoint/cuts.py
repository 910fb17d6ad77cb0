"""Random tensors, and random ways to cut them into boxes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from megalm.checkpoint import Shard
from megalm.checkpoint.manifest import DTYPES, Region


def random_tensor(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    """Random bits, so NaNs with any payload, infinities and denormals occur too."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == "bool" else 256
    width = DTYPES[dtype][1]
    data = torch.randint(high, (int(np.prod(shape)) * width,), generator=generator, dtype=torch.uint8)
    return data.view(getattr(torch, dtype)).reshape(shape)


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def part(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(region.offset, region.size, strict=True))]


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(1, 6), max_size=3).map(tuple)


@st.composite
def region_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    offset = tuple(draw(st.integers(0, dim - 1)) for dim in shape)
    return Region(offset, tuple(draw(st.integers(0, dim - o)) for dim, o in zip(shape, offset, strict=True)))


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Region]:
    """Boxes that tile a shape: cut in two again and again, along any dim; some may be empty."""
    regions = [Region((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5)) if shape else 0):
        region = regions.pop(draw(st.integers(0, len(regions) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, region.size[dim]))
        for start, length in ((0, at), (at, region.size[dim] - at)):
            offset, size = list(region.offset), list(region.size)
            offset[dim] += start
            size[dim] = length
            regions.append(Region(tuple(offset), tuple(size)))
    return regions


@st.composite
def shards_of(draw: st.DrawFn, tensor: torch.Tensor) -> list[Shard]:
    """Shards of a tensor named x, that together hold all of it; some in larger, padded tensors, some turned."""
    shards = []
    for region in draw(cuts(tuple(tensor.shape))):
        local = part(tensor, region)
        if local.dim() and draw(st.booleans()):
            padded = local.new_zeros(local.shape[0] + 2, *local.shape[1:])
            padded[: local.shape[0]] = local
            local = padded
        if draw(st.booleans()):
            turned = tuple(reversed(range(local.dim())))
            local = local.permute(turned).contiguous().permute(turned)
        shards.append(Shard("x", local.clone(), tuple(tensor.shape), region.offset, region.size))
    return shards
