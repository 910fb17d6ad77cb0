"""Which source is sample i drawn from, and how many were drawn from it before? Computed for any i from small tables.

    i --StagedBlend--> stage --Blend of the stage--> source, rank in the source

A `Blend` is a table of slots that repeats for ever. A `StagedBlend` is one blend after another, each for a number of
samples; every source goes on in a stage where it stopped in the one before. What comes out is a function of i alone, so
a run's place in its data is one integer.

Source: Tijdeman, "The chairman assignment problem" (1980). Shape suffixes: B samples, N sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from megalm._order import interleave
from megalm.errors import UserError

MAX_PERIOD = 2**18  # slots of a blend's table: 2 MB, built in a fifth of a second
SEARCH = 2**24  # weights looked at, at most, to find the period in which they round best


class Mixture(Protocol):
    """What decides the source of each sample."""

    def locate(self, index: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sample and its rank within that source: int64, of the shape of `index`."""
        ...

    def drawn(self, samples: int) -> np.ndarray:
        """How many of the first `samples` are from each source: int64[N]."""
        ...

    def describe(self) -> object:
        """All that decides it, as plain JSON values."""
        ...


class Blend:
    """Which source sample i is drawn from, and how many samples were drawn from that source before.

    A table of `period` slots repeats for ever; source s has `counts[s]` slots in it, so its share is exactly
    counts[s] / period. After EVERY prefix of i samples, |samples of s - share_s * i| < 1, for all sources.

    The shares are the weights / their sum (as the decimals that Python prints) exactly, if these have a common
    denominator of at most MAX_PERIOD, as 0.7 and 0.3 have. If not, the period up to MAX_PERIOD is taken in which they
    round best: a share is then less than 1 / MAX_PERIOD from its weight, about MAX_PERIOD**-(1 + 1 / (sources - 1))
    where the sources are few. A weight under 1 / MAX_PERIOD of the sum is refused, by its key: one of `keys` if given.
    """

    def __init__(self, weights: Sequence[float], keys: Sequence[str] | None = None) -> None:
        self.counts = _apportion(weights, keys or [f"data.sources[{s}].weight" for s in range(len(weights))])
        self.period = sum(self.counts)
        self._counts = np.array(self.counts, np.int64)
        self._source, self._rank = interleave(self._counts)

    def locate(self, index: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sample and its rank within that source: int64, of the shape of `index`."""
        period, slot = np.divmod(np.asarray(index, np.int64), self.period)
        source = self._source[slot].astype(np.int64)
        return source, period * self._counts[source] + self._rank[slot]

    def drawn(self, samples: int) -> np.ndarray:
        """How many of the first `samples` are from each source: int64[N]."""
        periods, slots = divmod(samples, self.period)
        return periods * self._counts + np.bincount(self._source[:slots], minlength=len(self.counts))

    @property
    def nbytes(self) -> int:
        """Memory that the table takes."""
        return self._source.nbytes + self._rank.nbytes

    def describe(self) -> object:
        """The slots of each source."""
        return self.counts


@dataclass(frozen=True)
class Stage:
    """A blend for so many samples; `weights` has a weight for each source that takes part, by the source's number."""

    name: str
    weights: Mapping[int, float]
    samples: int | None
    """None in the last stage, which has no end."""


class StagedBlend:
    """One blend after another, over the sources of `names`, of which each stage uses some.

    Within a stage, after every prefix, each source is less than one sample from its share of the stage.
    """

    def __init__(self, stages: Sequence[Stage], names: Sequence[str]) -> None:
        if any(stage.samples is None for stage in stages[:-1]) or stages[-1].samples is not None:
            raise ValueError("the last stage, and no other, has no end")
        self._members = [np.array(sorted(stage.weights), np.int64) for stage in stages]
        self._blends = []
        for number, (stage, members) in enumerate(zip(stages, self._members, strict=True)):
            keys = [f"data.stages[{number}].weights.{names[s]}" for s in members.tolist()]
            self._blends.append(Blend([stage.weights[s] for s in members.tolist()], keys))
        lengths = [stage.samples or 0 for stage in stages[:-1]]
        self.starts = np.cumsum([0, *lengths])
        self._before = np.zeros((len(stages), len(names)), np.int64)
        for number, length in enumerate(lengths):
            self._before[number + 1] = self._before[number]
            self._before[number + 1, self._members[number]] += self._blends[number].drawn(length)

    def locate(self, index: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sample and its rank within that source: int64, of the shape of `index`."""
        indices = np.asarray(index, np.int64)
        source, rank = np.empty_like(indices), np.empty_like(indices)
        stage = np.searchsorted(self.starts, indices, side="right") - 1
        for number in np.unique(stage).tolist():
            mine = stage == number
            member, drawn = self._blends[number].locate(indices[mine] - self.starts[number])
            source[mine] = self._members[number][member]
            rank[mine] = self._before[number, source[mine]] + drawn
        return source, rank

    def drawn(self, samples: int) -> np.ndarray:
        """How many of the first `samples` are from each source: int64[N]."""
        number = int(np.searchsorted(self.starts, samples, side="right")) - 1
        drawn = self._before[number].copy()
        drawn[self._members[number]] += self._blends[number].drawn(samples - int(self.starts[number]))
        return drawn

    def describe(self) -> object:
        """Each stage's first sample, sources and slots."""
        stages = zip(self.starts.tolist(), self._members, self._blends, strict=True)
        return [[first, members.tolist(), blend.counts] for first, members, blend in stages]


def _apportion(weights: Sequence[float], keys: Sequence[str]) -> list[int]:
    """Slots of each source in a period; their sum is the period."""
    for key, weight in zip(keys, weights, strict=True):
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"{key}={weight:g} is not a positive number")
    exact = [Fraction(repr(float(weight))) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    for source, share in enumerate(shares):
        if share * MAX_PERIOD < 1:
            raise UserError(
                f"{keys[source]}={weights[source]:g} is {float(share):.2g} of all weights, less than "
                f"1/{MAX_PERIOD}, the smallest share that can be blended: raise it or leave the source out"
            )
    period = math.lcm(*(share.denominator for share in shares))
    if period > MAX_PERIOD:
        period = _best_period([float(share) for share in shares], smallest=math.ceil(1 / min(shares)))
    # Largest remainders: every source gets its share rounded down, the slots left over go to those that lost most.
    counts = [math.floor(share * period) for share in shares]
    lost = sorted(range(len(shares)), key=lambda s: (counts[s] - shares[s] * period, s))
    for source in lost[: period - sum(counts)]:
        counts[source] += 1
    return counts


def _best_period(shares: list[float], smallest: int) -> int:
    """The period in `smallest`..MAX_PERIOD, or in its upper part if sources are many, that moves shares the least."""
    periods = np.arange(max(smallest, MAX_PERIOD - SEARCH // len(shares)), MAX_PERIOD + 1)
    error, slots = np.zeros(len(periods)), np.zeros(len(periods))
    for share in shares:
        rounded = np.rint(share * periods)
        slots += rounded
        np.maximum(error, np.abs(share * periods - rounded), out=error)
    error[slots != periods] = 1.0  # the slots left over move a share by less than one slot
    return int(periods[np.argmin(np.round(error / periods, 14))])
