"""What a layer has to know of tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass, field

from megalm.parallel.mesh import Axis
from megalm.parallel.weight_gradients import WeightGradientQueue


@dataclass(frozen=True)
class TensorParallel:
    """`TensorParallel()` is that of one process, under which every layer is its plain self."""

    axis: Axis = field(default_factory=Axis)
    sequence: bool = False
    """Whether each rank holds only T / size rows of the activations between the parallel regions."""
    overlap: int = 1
    """Chunks of a gather, each of which travels while the one before it is multiplied."""
    queue: WeightGradientQueue = field(default_factory=WeightGradientQueue)
