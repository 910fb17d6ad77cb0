"""Which stage gets which layers: the slowest stage, which all others wait for, is made as fast as it can be.

    pieces       embedding | layer 0 | layer 1 | layer 2 | layer 3 | head
    stages       [ embedding  layer 0  layer 1 ][ layer 2 ][ layer 3  head ]       every stage has a layer

Stages are runs of layers, so their times are sums of intervals: the least bound that a greedy filling keeps is found by
bisection over these sums, and it is exact. Of all partitions under this bound, one is taken whose ranks are balanced.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    memory: float = 0.0
    """What a stage with this piece needs for it in all: parameters, and activations of as many micro-batches as it
    keeps."""

    @property
    def time(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient


def partition(pieces: Sequence[Piece], placement: Placement, memory_cap: float = inf) -> Bounds:
    """Stages for embedding, layers and head. The cap is on each stage's `memory`: where a rank has several stages, each
    has its share. Raises UserError if no partition keeps it."""
    times, memory = _items([p.time for p in pieces]), _items([p.memory for p in pieces])
    stages = len(placement)
    assert stages <= len(times), "every stage needs a layer"
    bound = _least_bound(times, memory, stages, memory_cap)
    if bound is None:
        raise UserError(
            f"parallel.pipeline: no partition of {len(times)} layers into {stages} stages keeps each under a memory of "
            f"{memory_cap:g}: choose more pipeline ranks, more recomputation or a smaller micro-batch"
        )
    cuts = _even_cuts(times, memory, stages, bound, memory_cap)
    return tuple(pairwise(_balanced(cuts, times, memory, placement, bound, memory_cap)))


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


def _least_bound(times: list[float], memory: list[float], stages: int, cap: float) -> float | None:
    sums = sorted({sum_ for first in range(len(times)) for sum_ in accumulate(times[first:])})
    low, high = 0, len(sums)
    while low < high:
        middle = (low + high) // 2
        if _stages_needed(times, memory, sums[middle], cap) <= stages:
            high = middle
        else:
            low = middle + 1
    return sums[low] if low < len(sums) else None


def _stages_needed(times: list[float], memory: list[float], bound: float, cap: float) -> float:
    needed, time, held = 1, 0.0, 0.0
    for t, m in zip(times, memory, strict=True):
        if t > bound or m > cap:
            return inf
        if time + t > bound or held + m > cap:
            needed, time, held = needed + 1, 0.0, 0.0
        time, held = time + t, held + m
    return needed


def _even_cuts(times: list[float], memory: list[float], stages: int, bound: float, cap: float) -> list[int]:
    """Of the partitions under the bound, the one whose stages' times have the least sum of squares."""
    count = len(times)
    best = [0.0] + [inf] * count
    origins: list[list[int]] = []
    for _ in range(stages):
        after, origin = [inf] * (count + 1), [0] * (count + 1)
        for first in range(count):
            time = held = 0.0
            for end in range(first + 1, count + 1):
                time, held = time + times[end - 1], held + memory[end - 1]
                if time > bound or held > cap:
                    break
                if best[first] + time * time < after[end]:
                    after[end], origin[end] = best[first] + time * time, first
        best = after
        origins.append(origin)
    cuts = [count]
    for origin in reversed(origins):
        cuts.append(origin[cuts[-1]])
    return cuts[::-1]


def _balanced(
    cuts: list[int], times: list[float], memory: list[float], placement: Placement, bound: float, cap: float
) -> list[int]:
    """Moves single layers from stage to stage, those between shifting along, as long as it evens out the ranks."""

    def score(cuts: list[int]) -> tuple[float, float]:
        ranks = [0.0] * (max(placement) + 1)
        for rank, (first, end) in zip(placement, pairwise(cuts), strict=True):
            time = sum(times[first:end])
            if first == end or time > bound or sum(memory[first:end]) > cap:
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
