"""The schedule `auto`: an order made for the costs at hand, under a cap on memory.

Three steps, each of which keeps the best so far:

    1. the templates that fit the placement and the cap;
    2. greedy orders with the real costs: forwards and backwards come in the interleaved order, as soon as they can and
       memory allows; weight gradients fill the gaps. Which of a forward and a backward goes first, how much of a
       weight gradient must fit into a gap, and how memory is spread over the ranks is tried in several ways;
    3. hill climbing: one action is moved a few places on its rank, and stays there if the step is not longer and memory
       holds. Steps on a plateau are what makes it climb.

Random restarts of step 2 were worse than templates with unit costs; made with the real costs it is mostly at the floor.
The random numbers have a fixed seed and the rounds are counted, not timed: the same inputs give the same orders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import inf
from random import Random

from megalm.errors import UserError
from megalm.parallel.pipeline.plan import Orders, Placement, PlanError, Schedule, v_shaped
from megalm.parallel.pipeline.schedules import compute_orders, templates
from megalm.parallel.pipeline.simulate import Costs, Step

SIMULATED = 2_000_000
"""Actions that hill climbing may simulate: under a second."""

Numbers = list[list[int]]


def search(placement: Placement, micro_batches: int, costs: Costs, memory_cap: float | None = None) -> Orders:
    """The best orders found. Raises UserError if none fits under the cap; without one it is twice what the leanest
    template takes, which is about what the best orders need."""
    step = Step(placement, micro_batches, costs)
    known = [_numbers(step, compute_orders(name, placement, micro_batches)) for name in templates(placement)]
    least = min(_peak(step, orders) for orders in known)
    cap = 2 * least if memory_cap is None else memory_cap
    candidates = [orders for orders in (*known, *_greedy_orders(step, cap)) if _peak(step, orders) <= cap]
    if not candidates:
        raise UserError(
            f"parallel.pipeline.schedule=auto: no order was found whose activations take no more than {cap:g} on each "
            f"rank (the leanest template takes {least:g}): choose more recomputation or a smaller micro-batch"
        )
    best = min(candidates, key=lambda orders: (max(step.ends(orders)), _peak(step, orders)))
    return tuple(tuple(map(step.action, order)) for order in _climb(step, best, cap))


def _numbers(step: Step, orders: Orders) -> Numbers:
    return [list(map(step.number, order)) for order in orders]


def _peak(step: Step, orders: Sequence[Sequence[int]]) -> float:
    return max(map(step.peak, orders))


def _greedy_orders(step: Step, cap: float) -> Iterator[Numbers]:
    ranks = max(step.placement) + 1
    template: Schedule = "zbv" if step.placement == v_shaped(ranks) else "interleaved"
    passes = _numbers(step, compute_orders(template, step.placement, step.micro_batches))
    n = step.count
    forwards = [[a for a in order if a < n] for order in passes]
    backwards = [[a % n + 2 * n for a in order if n <= a < 3 * n] for order in passes]
    for in_turn, gap, slope in product((False, True), (0.0, 0.5, 1.0), (0, 1)):
        unit = max(step.costs.activation)
        caps = [cap - slope * rank * unit for rank in range(ranks)]
        if (orders := _Greedy(step, forwards, backwards, caps, in_turn, gap).run()) is not None:
            yield orders


class _Greedy:
    """Gives whichever rank can begin first its next action, until all is done or nothing can begin."""

    def __init__(
        self, step: Step, forwards: Numbers, backwards: Numbers, caps: list[float], in_turn: bool, gap: float
    ) -> None:
        self.step, self.caps, self.in_turn, self.gap = step, caps, in_turn, gap
        self.todo = tuple([order[::-1] for order in orders] for orders in (forwards, backwards))  # next ones last
        self.weights: Numbers = [[] for _ in forwards]
        self.orders: Numbers = [[] for _ in forwards]
        self.end = [-1.0] * (4 * step.count)
        self.free, self.held = [0.0] * len(forwards), [0.0] * len(forwards)

    def run(self) -> Numbers | None:
        step = self.step
        ranks = range(len(self.orders))
        next_up = [self._next(rank) for rank in ranks]
        for _ in range(3 * step.count):
            rank = min(ranks, key=lambda rank: next_up[rank][0])
            start, action = next_up[rank]
            if start == inf:
                return None
            self._do(rank, start, action)
            stage = action % step.count // step.micro_batches
            for changed in {rank, *(step.placement[s] for s in (stage - 1, stage + 1) if 0 <= s < len(step.placement))}:
                next_up[changed] = self._next(changed)
        return self.orders

    def _next(self, rank: int) -> tuple[float, int]:
        """When the rank can begin its next action, and which."""
        step, now = self.step, self.free[rank]
        forward, backward = (self._arrival(orders[rank]) for orders in self.todo)
        if forward < inf and self.held[rank] + self._activation(self.todo[0][rank][-1]) > self.caps[rank]:
            forward = inf
        forward, backward = max(forward, now), max(backward, now)
        start = min(forward, backward)
        if self.weights[rank]:
            weight = self.weights[rank][0]
            if start > now and start >= now + self.gap * step.duration[weight]:
                return now, weight
        if start == inf:
            return inf, -1
        was_backward = bool(self.orders[rank]) and self.orders[rank][-1] >= step.count
        takes_forward = self.in_turn and was_backward if forward == backward else forward < backward
        return start, self.todo[not takes_forward][rank][-1]

    def _do(self, rank: int, start: float, action: int) -> None:
        step = self.step
        kind = action // step.count
        if kind == 3:
            self.weights[rank].remove(action)
            self.held[rank] -= self._activation(action)
        else:
            self.todo[kind // 2][rank].pop()
            if kind == 0:
                self.held[rank] += self._activation(action)
            else:
                self.weights[rank].append(action + step.count)
        self.free[rank] = self.end[step.slot[action]] = start + step.duration[action]
        self.orders[rank].append(action)

    def _arrival(self, todo: list[int]) -> float:
        if not todo:
            return inf
        source = self.step.waits_for[todo[-1]]
        if source < 0:
            return 0.0
        return self.end[source] + self.step.delay[todo[-1]] if self.end[source] >= 0 else inf

    def _activation(self, action: int) -> float:
        return self.step.costs.activation[action % self.step.count // self.step.micro_batches]


def _climb(step: Step, orders: Numbers, cap: float) -> Numbers:
    random = Random(0)
    span, least = max(step.ends(orders)), step.bound(orders)
    for _ in range(SIMULATED // sum(map(len, orders))):
        if span <= least * (1 + 1e-9):
            break
        order = random.choice(orders)
        here = random.randrange(len(order))
        there = here + random.choice((-1, 1)) * (1 + int(random.expovariate(0.3)))
        if not 0 <= there < len(order):
            continue
        order.insert(there, order.pop(here))
        try:
            moved = max(step.ends(orders)) if step.peak(order) <= cap else inf
        except PlanError:
            moved = inf
        if moved <= span:
            span = moved
        else:
            order.insert(here, order.pop(there))
    return orders
