"""What a checkpoint holds: each rank's boxes of all parameters and of the optimizer's state, by names that no layout
changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megalm.checkpoint import Shard
from megalm.parallel.zero.regions import Region, local
from megalm.train.build import Parts


def shards(parts: Parts) -> Iterator[Shard]:
    """`model.<parameter>`, and `optimizer.<kind>.<parameter>` for each kind of state. A tied copy is loaded, not
    saved."""
    for region in parts.held:
        box = region.part.shape, region.offset, region.size, region.primary
        yield Shard(f"model.{region.name}", local(region.parameter), *box)
        for kind, tensor in parts.optimizer.state[region.parameter].items():
            name = f"optimizer.{kind}.{region.name}"
            if tensor.ndim:
                yield Shard(name, local(tensor), *box)
            else:  # a count of steps: who has the parameter's first element saves it
                yield Shard(name, tensor, (), (), (), region.primary and not any(region.offset))


def model_shards(held: Sequence[Region]) -> list[Shard]:
    """The parameters alone, to be loaded."""
    return [
        Shard(f"model.{region.name}", local(region.parameter), region.part.shape, region.offset, region.size)
        for region in held
    ]
