"""What each ZeRO stage holds and sends, as formulas. The parameters of a pipeline stage are cut into units (a block
each, and the root: all that is outside of blocks) over N = `data_shard` ranks, R = `data_replicate` times. With w bytes
a value in computation and f in the optimizer (4), for u values of a unit and U of all, a data rank holds at the peak

              parameters                                gradients          AdamW's moments
    stage 0   f U + w U                                 f U                2 f U
    stage 1   f U/N + w U                               f U                2 f U/N
    stage 2   f U/N + w U                               f U/N              2 f U/N
    stage 3   f U/N + w (root + two blocks)             f U/N              2 f U/N

(with one micro-batch a step, stage 1 has the gradients of stage 2) and for a moment one unit's message. In a step of
m micro-batches, one after the other, it takes part in

              gathers (w u bytes each)                  sums (f u)
    stage 0   none                                      an all-reduce of each unit
    stage 1   each unit once                            a reduce-scatter of each unit
    stage 2   each unit once                            m reduce-scatters of each unit
    stage 3   m of the root, 2 m of each block          m reduce-scatters of each unit

and if R > 1 in an all-reduce of each unit's shard (f u/N). With a pipeline, stage 3 gathers the root up to 2 m times,
and deferred weight gradients are at times reduced apart from their unit's biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Traffic:
    """Collectives of a step and the bytes of their buffers: what a gather gives, what a reduction takes."""

    gathers: int = 0
    gathered: int = 0
    scatters: int = 0
    scattered: int = 0
    sums: int = 0
    summed: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step."""

    parameters: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.moments


def padded(unit: Sequence[Shape], shards: int) -> int:
    """Values of a unit, each parameter's rows filled up to a multiple of `shards`."""
    return sum(-(-shape[0] // shards) * shards * prod(shape[1:]) for shape in unit)


def memory(
    blocks: Sequence[Sequence[Shape]], root: Sequence[Shape], stage: int, shards: int, micro_batches: int, compute: int
) -> Memory:
    """`blocks`, `root`: shapes of their parameters on a tensor rank; `compute`: bytes a value in computation."""
    sizes = [padded(unit, shards) for unit in blocks]
    total = sum(sizes) + padded(root, shards)
    whole = padded(root, shards) + sum(sorted(sizes)[-2:]) if stage == 3 else total
    sharded_gradients = stage >= 2 or (stage == 1 and micro_batches == 1)
    shard = 4 * total // shards
    return Memory(shard + compute * whole, shard if sharded_gradients else 4 * total, 2 * shard)


def traffic(
    blocks: Sequence[Sequence[Shape]],
    root: Sequence[Shape],
    stage: int,
    shards: int,
    replicas: int,
    micro_batches: int,
    compute: int,
) -> Traffic:
    """Of one data rank in a step without pipeline, with optimizer values of 4 bytes."""
    units, inner, outer = len(blocks) + 1, sum(padded(unit, shards) for unit in blocks), padded(root, shards)
    total = inner + outer
    gathers = gathered = scatters = scattered = sums = summed = 0
    if shards > 1:
        in_blocks, in_root = (2 * micro_batches, micro_batches) if stage == 3 else (1, 1)
        gathers, gathered = in_blocks * len(blocks) + in_root, compute * (in_blocks * inner + in_root * outer)
        times = micro_batches if stage >= 2 else 1
        scatters, scattered = times * units, times * 4 * total
    if replicas > 1:
        sums, summed = units, 4 * total // shards
    return Traffic(gathers, gathered, scatters, scattered, sums, summed)
