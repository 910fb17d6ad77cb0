"""Which tokens is sample i? Computed, not looked up: no index is built, whatever the size of the data.

    i      --Blend-->                                         source, rank in the source
    rank   --divmod by the source's windows-->                epoch, place in the epoch
    place  --Permutation keyed by (seed, source, epoch)-->    window
    window --times the sequence length, plus the epoch's phase-->  first token

All follows from the seed, the sources' names, sizes and weights, the sequence length, and i; never from rank, worker or
batch. So a run's place in its data is one integer.

Sources: cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains" (2002). Blend: Tijdeman, "The
chairman assignment problem" (1980). Shape suffix: B samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
import xxhash

from megalm.errors import UserError

ROUNDS = (
    8  # of the Feistel network. 4 are enough for large ranges (Luby and Rackoff), but for 3 to 16 values a chi-squared
)
# test of 200,000 keys shows unevenness at 6 rounds and none at 8.
MAX_PERIOD = 2**18  # slots of the blend's table: 1.6 MB, built in a fraction of a second
SEARCH = 2**24  # weights looked at, at most, to find the period in which they round best


def derive_key(purpose: str, seed: int, source: str, epoch: int) -> int:
    """A 64-bit key: xxh3-64 of the UTF-8 JSON array [purpose, seed, source, epoch], without spaces."""
    text = json.dumps([purpose, seed, source, epoch], ensure_ascii=False, separators=(",", ":"))
    return xxhash.xxh3_64_intdigest(text.encode())


class Permutation:
    """A keyed bijection of range(size): a balanced Feistel network over the smallest even number of bits that holds
    size - 1, applied again while its value is not below size (4 times on average, at most).

    `size` (1 to 2**62) and `key` (64 bits) may be arrays: then each element of the index has its own permutation.
    """

    def __init__(self, size: int | np.ndarray, key: int | np.ndarray) -> None:
        self._size = np.asarray(size, np.uint64)
        self._key = np.asarray(key, np.uint64)
        if not ((self._size >= 1) & (self._size <= 2**62)).all():
            raise ValueError("the size of a permutation is 1 to 2**62")

    def __call__(self, index: int | np.ndarray) -> np.ndarray:
        """Where each index goes: int64 of the shape that index, size and key broadcast to; IndexError out of range."""
        indices = np.asarray(index)
        if not ((indices >= 0) & (indices < self._size)).all():
            raise IndexError("index outside of the permutation's range")
        broadcast = np.broadcast_arrays(indices.astype(np.uint64), self._size, self._key)
        value, size, key = (array.ravel() for array in broadcast)
        # The exponent of size - 1 as a float is its number of bits (one more where it rounds up, which does no harm).
        bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1]
        half = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
        keys = _mix(key + np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15))
        value = _feistel(value, half, keys)
        outside = np.flatnonzero(value >= size)
        while outside.size:
            value[outside] = _feistel(value[outside], half[outside], keys[:, outside])
            outside = outside[value[outside] >= size[outside]]
        return value.astype(np.int64).reshape(broadcast[0].shape)


def _feistel(value: np.ndarray, half: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One pass through the network; `half` is the number of bits on each side, `keys` has a row a round."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Stafford's variant 13): every input bit changes every output bit half of the time."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Blend:
    """Which source sample i is drawn from, and how many samples were drawn from that source before.

    A table of `period` slots repeats for ever; source s has `counts[s]` slots in it, so its share is exactly
    counts[s] / period. After EVERY prefix of i samples, |samples of s - share_s * i| < 1, for all sources.

    The shares are the weights / their sum (as the decimals that Python prints) exactly, if these have a common
    denominator of at most MAX_PERIOD, as 0.7 and 0.3 have. If not, the period up to MAX_PERIOD is taken in which they
    round best: a share is then less than 1 / MAX_PERIOD from its weight, about MAX_PERIOD**-(1 + 1 / (sources - 1))
    where the sources are few. A weight under 1 / MAX_PERIOD of the sum is refused.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = _apportion(weights)
        self.period = sum(self.counts)
        self._counts = np.array(self.counts, np.int64)
        jobs = _earliest_deadline_first(self.counts)
        self._source = np.repeat(np.arange(len(self.counts), dtype=np.int32), self._counts)[jobs]
        starts = np.cumsum(self._counts) - self._counts
        self._rank = (jobs - starts[self._source]).astype(np.int32)

    def locate(self, index: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sample and its rank within that source: int64, of the shape of `index`."""
        period, slot = np.divmod(np.asarray(index, np.int64), self.period)
        source = self._source[slot].astype(np.int64)
        return source, period * self._counts[source] + self._rank[slot]


def _apportion(weights: Sequence[float]) -> list[int]:
    """Slots of each source in a period; their sum is the period."""
    for source, weight in enumerate(weights):
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"data.sources[{source}].weight={weight:g} is not a positive number")
    exact = [Fraction(repr(float(weight))) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    for source, share in enumerate(shares):
        if share * MAX_PERIOD < 1:
            raise UserError(
                f"data.sources[{source}].weight={weights[source]:g} is {float(share):.2g} of all weights, less than "
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


def _earliest_deadline_first(counts: Sequence[int]) -> np.ndarray:
    """An order of a period's samples in which every prefix is within 1 of every share: int64[period], numbers of jobs.

    Job j of a source with share c/P is due, for the bound to hold, in the slots from floor(jP/c) to ceil((j+1)P/c) - 1:
    earlier, the source would be a sample or more ahead; later, behind. Tijdeman's theorem says that an order exists;
    unit jobs meet their deadlines if the ready one with the earliest is always next. The sources' jobs are numbered
    one source after the other. O(P log P).
    """
    period = sum(counts)
    job = np.concatenate([np.arange(count) for count in counts])
    count = np.repeat(counts, counts)
    release = job * period // count
    deadline = -(-(job + 1) * period // count) - 1
    urgency = deadline * period + np.arange(period)  # by deadline, then by source
    by_release = np.argsort(release, kind="stable")
    arrivals = np.searchsorted(release[by_release], np.arange(period), side="right").tolist()
    waiting = urgency[by_release].tolist()
    ready: list[int] = []
    order: list[int] = []
    arrived = 0
    for arrivals_so_far in arrivals:
        while arrived < arrivals_so_far:
            heappush(ready, waiting[arrived])
            arrived += 1
        order.append(heappop(ready))
    return np.array(order) % period


class Samples(NamedTuple):
    """Where samples lie: each int64[B]."""

    source_B: np.ndarray
    start_B: np.ndarray
    """First token of the sample in its source's training tokens."""


@dataclass(frozen=True)
class Order:
    """The order of all training samples of a run; sample i is tokens [start, start + sequence_length + 1) of a source.

    In each epoch of a source, each of its `windows` is drawn once. The windows lie back to back from a phase in
    [0, slack] that changes with the epoch, so that documents are not cut at the same places again.
    """

    names: Sequence[str]
    windows: Sequence[int]
    slack: Sequence[int]
    blend: Blend
    sequence_length: int
    seed: int

    def locate(self, first: int, count: int) -> Samples:
        """Places of the samples [first, first + count)."""
        source_B, rank_B = self.blend.locate(np.arange(first, first + count))
        windows_B = np.asarray(self.windows, np.int64)[source_B]
        epoch_B, place_B = np.divmod(rank_B, windows_B)
        pairs, pair_B = np.unique(epoch_B * len(self.names) + source_B, return_inverse=True)
        epochs = [divmod(pair, len(self.names)) for pair in pairs.tolist()]
        keys = np.array([derive_key("window", self.seed, self.names[s], epoch) for epoch, s in epochs], np.uint64)
        phases = np.array(
            [derive_key("phase", self.seed, self.names[s], epoch) % (self.slack[s] + 1) for epoch, s in epochs],
            np.int64,
        )
        window_B = Permutation(windows_B, keys[pair_B])(place_B)
        return Samples(source_B, window_B * self.sequence_length + phases[pair_B])
