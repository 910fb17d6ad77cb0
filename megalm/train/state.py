"""What a checkpoint holds: each rank's boxes of all parameters and of the optimizer's state, by names that no layout
changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megalm.checkpoint import Shard
from megalm.parallel.zero.regions import Region, local
from megalm.train.build import Parts


def shards(parts: Parts) -> Iterator[Shard]:
    """`model.<parameter>`, and `optimizer.<kind>.<parameter>` for each kind of state. A tied copy is loaded, not
    saved; what data replicas hold is saved by one of them each."""
    replicas = parts.mesh.data_replicate
    for region in parts.held:
        box = region.part.shape, region.offset, region.size
        saved = region.part.primary, (replicas.rank, replicas.size)
        yield Shard(f"model.{region.name}", local(region.parameter), *box, *saved)
        for kind, tensor in parts.optimizer.state[region.parameter].items():
            name = f"optimizer.{kind}.{region.name}"
            if tensor.ndim:
                yield Shard(name, local(tensor), *box, *saved)
            else:  # a count of steps: who has the parameter's first element saves it
                first = not any(region.offset)
                yield Shard(name, tensor, (), (), (), saved[0] and first, saved[1])


def model_shards(held: Sequence[Region]) -> list[Shard]:
    """The parameters alone, to be loaded."""
    return [
        Shard(f"model.{region.name}", local(region.parameter), region.part.shape, region.offset, region.size)
        for region in held
    ]
