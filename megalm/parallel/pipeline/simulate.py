"""How long a plan takes and what it holds, before anything runs.

Each rank does its compute actions in order; one begins when the rank is free and what it waits for has arrived:

    F of stage s   waits for F of stage s - 1 of the same micro-batch, and `latency` if that is another rank's
    B or I of s    waits for B or I of stage s + 1, and for its own F

Sends and receives run beside the compute. An activation lives from the start of its F to the end of its B or W: nearly
all that a stage keeps is needed for the weight gradients, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from megalm.parallel.pipeline.plan import COMPUTE, Action, Placement, PlanError


@dataclass(frozen=True)
class Costs:
    """What one micro-batch costs in each stage. Times are in any unit, memory in another."""

    forward: tuple[float, ...]
    input_gradient: tuple[float, ...]
    weight_gradient: tuple[float, ...]
    activation: tuple[float, ...]
    """Kept from the forward pass until the weight gradient is done."""
    latency: float = 0.0
    """From the end of an action until its result is on the next rank."""

    @classmethod
    def uniform(
        cls, stages: int, forward: float = 1, input_gradient: float = 1, weight_gradient: float = 1, latency: float = 0
    ) -> Costs:
        """Alike for all stages, an activation being 1."""
        return cls(
            forward=(forward,) * stages,
            input_gradient=(input_gradient,) * stages,
            weight_gradient=(weight_gradient,) * stages,
            activation=(1,) * stages,
            latency=latency,
        )


class Timed(NamedTuple):
    """When an action ran."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    ranks: tuple[tuple[Timed, ...], ...]
    """Each rank's compute actions, in order."""
    makespan: float
    """Until the last rank is done."""
    work: tuple[float, ...]
    """Each rank's busy time."""
    floor: float
    """A bubble that no plan for this placement can go below: some rank's wait for its first input."""
    peaks: tuple[float, ...]
    """The most that each rank's activations take at once."""
    messages: int
    """Between ranks, in the whole step."""

    @property
    def bubble(self) -> float:
        """Time that the busiest rank is idle."""
        return self.makespan - max(self.work)


class Step:
    """The actions of one step as numbers, for speed: F is `stage * micro_batches + micro_batch`, then come as many B, I
    and W each."""

    def __init__(self, placement: Placement, micro_batches: int, costs: Costs) -> None:
        stages = len(placement)
        self.placement, self.micro_batches, self.costs = placement, micro_batches, costs
        self.count = n = stages * micro_batches
        neighbours = [
            [t for t in (s - 1, s + 1) if 0 <= t < stages and placement[t] != placement[s]] for s in range(stages)
        ]
        whole = [i + w for i, w in zip(costs.input_gradient, costs.weight_gradient, strict=True)]
        times = (costs.forward, whole, costs.input_gradient, costs.weight_gradient)
        self.duration = [kind[s] for kind in times for s in range(stages) for _ in range(micro_batches)]
        self.slot = [*range(2 * n), *range(n, 2 * n), *range(3 * n, 4 * n)]  # B and I of a micro-batch end the same
        before = [-1] * micro_batches + [*range(n - micro_batches)]
        after = [*range(n + micro_batches, 2 * n), *range(n - micro_batches, n)]
        self.waits_for = [*before, *after, *after, *range(n, 2 * n)]
        down = [costs.latency * (s > 0 and s - 1 in neighbours[s]) for s in range(stages) for _ in range(micro_batches)]
        up = [costs.latency * (s + 1 in neighbours[s]) for s in range(stages) for _ in range(micro_batches)]
        self.delay = [*down, *up, *up, *[0.0] * n]

    def number(self, action: Action) -> int:
        return (COMPUTE.index(action.op) * len(self.placement) + action.stage) * self.micro_batches + action.micro_batch

    def action(self, number: int) -> Action:
        stages, micro_batch = divmod(number, self.micro_batches)
        kind, stage = divmod(stages, len(self.placement))
        return Action(COMPUTE[kind], stage, micro_batch)

    def ends(self, orders: Sequence[Sequence[int]]) -> list[float]:
        """When each action's slot is done; raises PlanError if some never is, for ranks wait for each other."""
        slot, waits_for, delay, duration = self.slot, self.waits_for, self.delay, self.duration
        end = [-1.0] * (4 * self.count)
        free, done = [0.0] * len(orders), [0] * len(orders)
        waiting: dict[int, int] = {}
        ready = list(range(len(orders)))
        while ready:
            rank = ready.pop()
            order, time = orders[rank], free[rank]
            for position in range(done[rank], len(order)):
                number = order[position]
                if (source := waits_for[number]) >= 0:
                    if (arrival := end[source]) < 0:
                        waiting[source] = rank
                        done[rank] = position
                        break
                    if (arrival := arrival + delay[number]) > time:
                        time = arrival
                time += duration[number]
                end[here := slot[number]] = time
                if here in waiting:
                    ready.append(waiting.pop(here))
            else:
                done[rank] = len(order)
            free[rank] = time
        for rank, order in enumerate(orders):
            if done[rank] < len(order):
                stuck = self.action(order[done[rank]])
                raise PlanError(f"rank {rank} waits for ever before {stuck}")
        return end

    def peak(self, order: Sequence[int]) -> float:
        """The most that a rank's activations take at once. Without backwards none outlives its own action."""
        n, activation = self.count, self.costs.activation
        keeps = max(order, default=0) >= n
        held = peak = 0.0
        for number in order:
            size = activation[number % n // self.micro_batches]
            if number < n:
                peak = max(peak, held + size)
                held += size * keeps
            elif not 2 * n <= number < 3 * n:
                held -= size
        return peak

    def bound(self, orders: Sequence[Sequence[int]]) -> float:
        """No order of the same actions is done earlier: each rank waits for its first input, then has its work."""
        heads: dict[int, float] = {}
        head = 0.0
        for stage, rank in enumerate(self.placement):
            first = stage * self.micro_batches
            head += self.delay[first]
            heads.setdefault(rank, head)
            head += self.duration[first]
        return max(heads[rank] + self.work(order) for rank, order in enumerate(orders))

    def work(self, order: Sequence[int]) -> float:
        return sum(self.duration[number] for number in order)


def simulate(plan: Sequence[Sequence[Action]], placement: Placement, costs: Costs) -> Simulation:
    """Runs a plan or the orders that it is made of. Raises PlanError if ranks would wait for each other for ever."""
    orders = [[action for action in actions if action.op in COMPUTE] for actions in plan]
    micro_batches = 1 + max((action.micro_batch for order in orders for action in order), default=-1)
    step = Step(placement, micro_batches, costs)
    numbers = [[step.number(action) for action in order] for order in orders]
    end = step.ends(numbers)
    ranks = []
    for order, row in zip(orders, numbers, strict=True):
        free, times = 0.0, []
        for action, number in zip(order, row, strict=True):
            source = step.waits_for[number]
            start = max(free, end[source] + step.delay[number] if source >= 0 else 0.0)
            free = end[step.slot[number]]
            times.append(Timed(action, start, free))
        ranks.append(tuple(times))
    work = tuple(map(step.work, numbers))
    crossings = sum(a != b for a, b in pairwise(placement)) * micro_batches
    return Simulation(
        ranks=tuple(ranks),
        makespan=max(rank[-1].end for rank in ranks),
        work=work,
        floor=step.bound(numbers) - max(work),
        peaks=tuple(map(step.peak, numbers)),
        messages=crossings * (2 if any(max(row) >= step.count for row in numbers) else 1),
    )
