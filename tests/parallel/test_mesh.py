from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from megalm.parallel.collectives import start_gather, start_scatter_sum, start_sum, wait
from megalm.parallel.mesh import AXES, Axis, Layout, Mesh, build_mesh

LAYOUTS = [
    (Layout(1, 1, 1, 1), 1),
    (Layout(1, 1, 2, 2), 1),
    (Layout(2, 2, 1, 2), 2),
    (Layout(2, 1, 2, 2), 1),
    (Layout(1, 2, 1, 4), 2),
    (Layout(3, 1, 2, 1), 1),
]
WITHOUT = {  # the axes that a group runs along
    "pipeline": ("pipeline",),
    "data_replicate": ("data_replicate",),
    "data_shard": ("data_shard",),
    "data": ("data_replicate", "data_shard"),
    "tensor": ("tensor",),
    "down": ("pipeline",),
    "up": ("pipeline",),
    "world": AXES,
}


def summed(mesh: Mesh, name: str) -> tuple[tuple[int, ...], int, float]:
    """An axis's ranks, this rank's place, and the sum of what numpy's grid holds there."""
    axis: Axis = getattr(mesh, name)
    value = torch.tensor([float(2**mesh.rank)])
    return axis.ranks, axis.rank, wait(start_sum(value, axis)).item()


def seen(layout: Layout, copies: int) -> dict[str, tuple[tuple[int, ...], int, float]]:
    mesh = build_mesh(layout, torch.device("cpu"), timedelta(seconds=60), copies)
    shards = None if mesh.shards is None else mesh.shards.mesh.tolist()
    assert (shards is None) == (layout.data == 1)
    if shards is not None:
        flat = [rank for row in shards for rank in row]
        assert flat == list(mesh.data.ranks)
        assert len(shards) == layout.data_replicate
    return {name: summed(mesh, name) for name in [*WITHOUT, "tensor_copies"]}


@pytest.mark.parametrize(("layout", "copies"), LAYOUTS, ids=str)
def test_each_group_holds_the_ranks_of_its_line_of_the_reshaped_range(layout: Layout, copies: int) -> None:
    grid = np.arange(layout.size).reshape(layout.shape)
    results = run_ranks(layout.size, seen, layout, copies)
    for rank, groups in enumerate(results):
        place = layout.coordinates(rank)
        assert grid[tuple(place.values())] == rank
        for name, axes in WITHOUT.items():
            line = grid[tuple(slice(None) if axis in axes else place[axis] for axis in AXES)].flatten()
            ranks, number, total = groups[name]
            assert ranks == tuple(line.tolist())
            assert ranks[number] == rank
            assert total == (2.0**line).sum()
        line = grid[place["pipeline"], place["data_replicate"], place["data_shard"]].reshape(-1, copies)
        assert groups["tensor_copies"][0] == tuple(line[place["tensor"] // copies].tolist())


def all_collectives() -> tuple[list[list[float]], ...]:
    mesh = build_mesh(Layout(tensor=dist.get_world_size()), torch.device("cpu"), timedelta(seconds=60))
    x = torch.arange(12.0).view(6, 2) * 10**mesh.rank
    return tuple(wait(start(x, mesh.tensor)).tolist() for start in (start_gather, start_scatter_sum, start_sum))


def test_collectives_keep_the_order_of_the_ranks() -> None:
    x = np.arange(12.0).reshape(6, 2)
    for rank, (gathered, scattered, total) in enumerate(run_ranks(3, all_collectives)):
        assert gathered == np.concatenate([x, 10 * x, 100 * x]).tolist()
        assert scattered == (111 * x)[2 * rank : 2 * rank + 2].tolist()
        assert total == (111 * x).tolist()


def test_a_mesh_of_another_size_than_the_world_is_refused_before_any_group_is_made() -> None:
    assert run_ranks(2, refused) == [1, 1]


def refused() -> int:
    with pytest.raises(AssertionError, match="2 processes for"):
        build_mesh(Layout(tensor=4), torch.device("cpu"), timedelta(seconds=60))
    return dist.distributed_c10d._world.group_count
