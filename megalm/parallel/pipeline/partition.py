"""Which stage gets which layers: the slowest stage, which all others wait for, is made as fast as it can be.

    pieces       embedding | layer 0 | layer 1 | layer 2 | layer 3 | head
    stages       [ embedding  layer 0  layer 1 ][ layer 2 ][ layer 3  head ]       every stage has a layer

Stages are runs of layers, so their times are sums of intervals: the least bound that a greedy filling keeps is found by
bisection over these sums, and it is exact. Of all partitions under this bound, one is taken whose ranks are balanced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from math import inf

from megalm.errors import UserError
from megalm.parallel.pipeline.plan import Placement
from megalm.parallel.pipeline.simulate import Costs

Bounds = tuple[tuple[int, int], ...]
"""For each stage, its first layer and the one after its last."""


@dataclass(frozen=True)
class Piece:
    """What the embedding, a layer or the head costs for a micro-batch, in any unit of time."""

    forward: float
    input_gradient: float
    weight_gradient: float
    activation: float = 0.0
    """Kept from the forward pass until the weight gradient is done."""

    @property
    def time(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient


def partition(pieces: Sequence[Piece], placement: Placement, caps: Sequence[float] | None = None) -> Bounds:
    """Stages for embedding, layers and head. `caps`: of each stage, on the sum of its `activation`. Raises UserError if
    no partition keeps them."""
    times, kept = _items([p.time for p in pieces]), _items([p.activation for p in pieces])
    stages = len(placement)
    assert stages <= len(times), "every stage needs a layer"
    caps = caps or [inf] * stages
    bound = _least_bound(times, kept, caps)
    if bound is None:
        raise UserError(
            f"parallel.pipeline.memory_cap: no partition of {len(times)} layers into {stages} stages keeps within it: "
            "raise it, or choose another schedule, more pipeline ranks or more recomputation"
        )
    cuts = _even_cuts(times, kept, bound, caps)
    return tuple(pairwise(_balanced(cuts, times, kept, placement, bound, caps)))


def bounds_of(layers: Sequence[int]) -> Bounds:
    """The stages that have so many layers each."""
    return tuple(pairwise(accumulate(layers, initial=0)))


def stage_costs(pieces: Sequence[Piece], bounds: Bounds, latency: float = 0.0) -> Costs:
    """The costs of stages made of embedding, layers and head."""
    embedding, *layers, head = pieces
    stages = [list(layers[first:end]) for first, end in bounds]
    stages[0].insert(0, embedding)
    stages[-1].append(head)
    return Costs(
        forward=tuple(sum(piece.forward for piece in stage) for stage in stages),
        input_gradient=tuple(sum(piece.input_gradient for piece in stage) for stage in stages),
        weight_gradient=tuple(sum(piece.weight_gradient for piece in stage) for stage in stages),
        activation=tuple(sum(piece.activation for piece in stage) for stage in stages),
        latency=latency,
    )


def _items(values: Sequence[float]) -> list[float]:
    """One number a layer: the embedding goes with the first, the head with the last."""
    items = list(values[1:-1])
    items[0] += values[0]
    items[-1] += values[-1]
    return items


def _least_bound(times: list[float], kept: list[float], caps: Sequence[float]) -> float | None:
    sums = sorted({sum_ for first in range(len(times)) for sum_ in accumulate(times[first:])})
    low, high = 0, len(sums)
    while low < high:
        middle = (low + high) // 2
        if _fits(times, kept, sums[middle], caps):
            high = middle
        else:
            low = middle + 1
    return sums[low] if low < len(sums) else None


def _fits(times: list[float], kept: list[float], bound: float, caps: Sequence[float]) -> bool:
    """Whether there is a partition under the bound and the caps."""
    ends = {0}  # at which the stages so far may end
    for cap in caps:
        ends = {end for first in ends for end, _ in _ends(times, kept, first, bound, cap)}
    return len(times) in ends


def _ends(times: list[float], kept: list[float], first: int, bound: float, cap: float) -> Iterator[tuple[int, float]]:
    """Where a stage from layer `first` on may end, and its time."""
    time = held = 0.0
    for end in range(first + 1, len(times) + 1):
        time, held = time + times[end - 1], held + kept[end - 1]
        if time > bound or held > cap:
            return
        yield end, time


def _even_cuts(times: list[float], kept: list[float], bound: float, caps: Sequence[float]) -> list[int]:
    """Of the partitions under the bound, the one whose stages' times have the least sum of squares."""
    count = len(times)
    best = [0.0] + [inf] * count
    origins: list[list[int]] = []
    for cap in caps:
        after, origin = [inf] * (count + 1), [0] * (count + 1)
        for first in (place for place in range(count) if best[place] < inf):
            for end, time in _ends(times, kept, first, bound, cap):
                if best[first] + time * time < after[end]:
                    after[end], origin[end] = best[first] + time * time, first
        best = after
        origins.append(origin)
    cuts = [count]
    for origin in reversed(origins):
        cuts.append(origin[cuts[-1]])
    return cuts[::-1]


def _balanced(
    cuts: list[int],
    times: list[float],
    kept: list[float],
    placement: Placement,
    bound: float,
    caps: Sequence[float],
) -> list[int]:
    """Moves single layers from stage to stage, those between shifting along, as long as it evens out the ranks."""

    def score(cuts: list[int]) -> tuple[float, float]:
        ranks = [0.0] * (max(placement) + 1)
        for rank, cap, (first, end) in zip(placement, caps, pairwise(cuts), strict=True):
            time = sum(times[first:end])
            if first == end or time > bound or sum(kept[first:end]) > cap:
                return inf, inf
            ranks[rank] += time
        return max(ranks), sum(time * time for time in ranks)

    current = score(cuts)
    while True:
        moves = [
            [cut + step * (low < place < high) for place, cut in enumerate(cuts)]
            for low, high in product(range(len(cuts)), repeat=2)
            for step in (-1, 1)
            if high - low > 1
        ]
        best = min(moves, key=score, default=cuts)
        if score(best) >= current:
            return cuts
        cuts, current = best, score(best)
