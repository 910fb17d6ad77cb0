"""The process grid: one range of ranks, reshaped, and the groups that are its lines.

    arange(16).view(pipeline 2, data_replicate 1, data_shard 4, tensor 2)

        pipeline 0                    pipeline 1
        shard 0   0  1                shard 0   8  9
        shard 1   2  3                shard 1  10 11          a row is a tensor group, inside one node;
        shard 2   4  5                shard 2  12 13          a column is a data group;
        shard 3   6  7                shard 3  14 15          the same place in each pipeline's table a pipeline group

Tensor ranks talk most and are neighbours; pipeline ranks talk least and are far apart. More axes (context, expert)
would be more dims of the same range.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

AXES = ("pipeline", "data_replicate", "data_shard", "tensor")


@dataclass(frozen=True)
class Layout:
    """The sizes of the axes, outermost first."""

    pipeline: int = 1
    data_replicate: int = 1
    data_shard: int = 1
    tensor: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.pipeline, self.data_replicate, self.data_shard, self.tensor

    @property
    def data(self) -> int:
        """Ranks that share a batch."""
        return self.data_replicate * self.data_shard

    @property
    def size(self) -> int:
        return prod(self.shape)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` stands on each axis."""
        place = {}
        for axis, size in zip(reversed(AXES), reversed(self.shape), strict=True):
            rank, place[axis] = divmod(rank, size)
        return {axis: place[axis] for axis in AXES}

    def lines(self, *axes: str) -> list[list[int]]:
        """The ranks of each group along `axes`: those that differ in these coordinates only, in order."""
        grid = torch.arange(self.size).view(self.shape)
        dims = [AXES.index(axis) for axis in axes]
        rest = [dim for dim in range(len(AXES)) if dim not in dims]
        return grid.permute(*rest, *dims).reshape(-1, prod(self.shape[dim] for dim in dims)).tolist()


@dataclass(frozen=True)
class Axis:
    """One rank's line through the grid."""

    ranks: tuple[int, ...] = (0,)
    """Global ranks, in order."""
    rank: int = 0
    """Place of this process among them."""
    group: ProcessGroup | None = None
    """None where the axis has one rank, and nothing is ever sent."""

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Mesh:
    """This process's axes. `Mesh()` is the grid of one process."""

    layout: Layout = Layout()
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    world: Axis = Axis()
    pipeline: Axis = Axis()
    data_replicate: Axis = Axis()
    data_shard: Axis = Axis()
    data: Axis = Axis()
    """Both data axes as one."""
    tensor: Axis = Axis()
    tensor_copies: Axis = Axis()
    """The neighbours on the tensor axis that hold the same key/value heads."""
    matrices: Axis = Axis()
    """Those that share each matrix of a stage, `data_shard` times `tensor`, for an optimizer that needs whole ones."""
    down: Axis = Axis()
    """The pipeline's ranks again, for what is sent from a rank to the next one (the last one's next is the first)."""
    up: Axis = Axis()
    """The same, for what is sent to the rank before: with a group for each direction neither waits for the other."""
    shards: DeviceMesh | None = None
    """(data_replicate, data_shard) through this process, for FSDP; None where it has nothing to do: with one data rank
    and no pipeline."""


def build_mesh(layout: Layout, device: torch.device, timeout: timedelta, tensor_copies: int = 1) -> Mesh:
    """The mesh of this process, whose default process group must exist and have `layout.size` ranks.

    All ranks make all groups in the same order, and one for all axes that run along the same ranks. `tensor_copies`
    neighbours on the tensor axis hold the same key/value heads. `timeout` bounds every collective.
    """
    assert dist.get_world_size() == layout.size, f"{dist.get_world_size()} processes for {layout}"
    rank = dist.get_rank()
    everyone = list(range(layout.size))
    made: dict[str, Axis] = {}
    if layout.size > 1:
        made[str([everyone])] = Axis(tuple(everyone), rank, dist.group.WORLD)

    def new_axis(lines: list[list[int]]) -> Axis:
        mine = Axis((rank,))
        for ranks in lines:
            if len(ranks) > 1:
                group = dist.new_group(ranks, timeout=timeout)
                if rank in ranks:
                    mine = Axis(tuple(ranks), ranks.index(rank), group)
        return mine

    def axis(lines: list[list[int]]) -> Axis:
        if (key := str(lines)) not in made:
            made[key] = new_axis(lines)
        return made[key]

    tensor = layout.lines("tensor")
    copies = [line[i : i + tensor_copies] for line in tensor for i in range(0, layout.tensor, tensor_copies)]
    replicate, shard = axis(layout.lines("data_replicate")), axis(layout.lines("data_shard"))
    data = axis(layout.lines("data_replicate", "data_shard"))
    shards = None
    if layout.data > 1 or layout.pipeline > 1:
        alone = dist.new_group([rank], use_local_synchronization=True)
        shards = DeviceMesh.from_group(
            [replicate.group or alone, shard.group or alone],
            device.type,
            torch.tensor(data.ranks).view(layout.data_replicate, layout.data_shard),
            mesh_dim_names=("data_replicate", "data_shard"),
        )
    return Mesh(
        layout,
        rank,
        device,
        world=axis([everyone]),
        pipeline=axis(layout.lines("pipeline")),
        data_replicate=replicate,
        data_shard=shard,
        data=data,
        tensor=axis(tensor),
        tensor_copies=axis(copies),
        matrices=axis(layout.lines("data_shard", "tensor")),
        down=new_axis(layout.lines("pipeline")),
        up=new_axis(layout.lines("pipeline")),
        shards=shards,
    )
