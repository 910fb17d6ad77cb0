"""What a layer has to know of tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from megalm.parallel.mesh import Axis
from megalm.parallel.part import Part
from megalm.parallel.weight_gradients import WeightGradientQueue


@dataclass(frozen=True)
class TensorParallel:
    """`TensorParallel()` is that of one process, under which every layer is its plain self."""

    axis: Axis = field(default_factory=Axis)
    sequence: bool = False
    """Whether each rank holds only T / size rows of the activations between the parallel regions."""
    overlap: int = 1
    """Chunks of a gather, each of which travels while the one before it is multiplied."""
    queue: WeightGradientQueue | None = None
    """Where weight gradients can wait; None if the plan never splits a backward pass."""

    @property
    def shards_rows(self) -> bool:
        return self.sequence and self.axis.size > 1

    @property
    def defers(self) -> bool:
        """Whether the backward pass that runs leaves its weight gradients to the queue."""
        return self.queue is not None and self.queue.key is not None

    def local_rows(self, x: Tensor) -> Tensor:
        """This rank's share of the rows of `x`, which all ranks hold."""
        return x.chunk(self.axis.size)[self.axis.rank] if self.shards_rows else x

    def part(self, shape: tuple[int, ...], dim: int, copies: int = 1) -> Part:
        """This rank's box of a parameter of which each group of `copies` neighbours holds an equal slice of `dim`, and
        each of them uses it for heads of its own."""
        count, number = self.axis.size // copies, self.axis.rank // copies
        size, offset = list(shape), [0] * len(shape)
        assert shape[dim] % count == 0, f"{shape[dim]} cannot be shared between {count} ranks"
        size[dim] //= count
        offset[dim] = size[dim] * number
        return Part(shape, tuple(offset), tuple(size), copies, copies > 1, self.axis.rank % copies == 0)

    def copied(self, *shape: int, partial: bool) -> Part:
        """A parameter that every rank holds whole."""
        several = self.axis.size > 1
        return Part(shape, (0,) * len(shape), shape, self.axis.size, partial and several, self.axis.rank == 0)
