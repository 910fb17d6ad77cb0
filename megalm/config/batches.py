"""How many sequences each step takes: the batch ramp as arithmetic, without a loop over steps.

A ramp goes from `start` to `global_size` in k = (global_size - start) / increment jumps. The size of a step depends on
the samples c consumed before it (Megatron-LM's meaning of `--rampup-batch-size start increment samples`):

    size(c) = start + increment * min(k, floor(c * k / samples))

so every size is used for about samples / k sequences. Steps of one size in a row form a `Piece`; everything else is a
binary search among the pieces. Steps are numbered from 0 here: step i is the one after i finished steps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from megalm.config.sections import Batch


@dataclass(frozen=True)
class Piece:
    """Consecutive steps of one size; the last piece has no end."""

    first_step: int
    first_sample: int
    size: int


@dataclass(frozen=True)
class BatchPlan:
    """The sizes of all steps."""

    pieces: tuple[Piece, ...]

    def size(self, step: int) -> int:
        """Sequences in step `step`."""
        return self._last(step, lambda piece: piece.first_step).size

    def first_sample(self, step: int) -> int:
        """Samples consumed before step `step`, which is the index of its first sample."""
        piece = self._last(step, lambda piece: piece.first_step)
        return piece.first_sample + (step - piece.first_step) * piece.size

    def whole_steps(self, samples: int) -> int:
        """The most steps that together take at most `samples`."""
        piece = self._last(samples, lambda piece: piece.first_sample)
        return piece.first_step + (samples - piece.first_sample) // piece.size

    def steps_for(self, samples: int) -> int:
        """The fewest steps that together take at least `samples`."""
        steps = self.whole_steps(samples)
        return steps if self.first_sample(steps) == samples else steps + 1

    def steps_for_tokens(self, tokens: int, sequence_length: int) -> int:
        """The fewest steps that together take at least `tokens`."""
        return self.steps_for(-(-tokens // sequence_length))

    def last_steps_for_tokens(self, tokens: int, sequence_length: int, steps: int) -> int:
        """The fewest steps at the end of a run of `steps` that together take at least `tokens`.

        `steps` + 1 if the whole run takes fewer.
        """
        before = self.first_sample(steps) - -(-tokens // sequence_length)
        return steps - self.whole_steps(before) if before >= 0 else steps + 1

    def _last(self, value: int, key: Callable[[Piece], int]) -> Piece:
        """The piece that holds step or sample number `value`."""
        if value < 0:
            raise ValueError(f"steps and samples are counted from 0, not {value}")
        return self.pieces[bisect_right(self.pieces, value, key=key) - 1]


def plan_batches(batch: Batch) -> BatchPlan:
    """The sizes of all steps under `batch.ramp`, in time proportional to the number of different sizes."""
    ramp = batch.ramp
    if ramp is None:
        return BatchPlan((Piece(0, 0, batch.global_size),))
    jumps = (batch.global_size - ramp.start) // ramp.increment
    pieces: list[Piece] = []
    step = sample = 0
    while True:
        jump = min(jumps, sample * jumps // ramp.samples)
        size = ramp.start + jump * ramp.increment
        pieces.append(Piece(step, sample, size))
        if jump == jumps:
            return BatchPlan(tuple(pieces))
        end = -(-(jump + 1) * ramp.samples // jumps)  # the first count of consumed samples with a larger size
        steps = -(-(end - sample) // size)
        step += steps
        sample += steps * size
