"""The known pipeline schedules: in which order each rank does its forward and backward passes.

Two families. Where the stages are looped over the ranks, a rank has one order of forwards and one of backwards, in
groups of micro-batches that go through all its chunks; it begins with a warm-up of forwards, then does one forward and
one backward in turn, and ends with backwards. Here 1F1B on four ranks, the warm-up 3, 2, 1 and 0 forwards:

    rank 0  F0 F1 F2 F3                B0 F4 B1 F5 B2 ...
    rank 1     F0 F1 F2          B0 F3 B1 F4 B2 F5 ...
    rank 2        F0 F1    B0 F2 B1 F3 B2 F4 B3 ...
    rank 3           F0 B0 F1 B1 F2 B2 F3 B3 F4 ...

    schedule        source                  group   warm-up of rank r           weight gradients
    gpipe           arXiv 1811.06965        all     all                         with the input's
    1f1b            arXiv 2006.09503        -       p-1-r                       with the input's
    interleaved     arXiv 2104.04473        p       group (v-1) + 2 (p-1-r)     with the input's
    looped-bfs      arXiv 2211.05953        all     all                         with the input's
    zb-h1           arXiv 2401.10241        -       p-1-r                       r backwards later
    interleaved-zb  the same, interleaved   p       group (v-1) + (p-1-r)       r backwards later

    (p ranks, v chunks a rank. A group is larger than p where p does not divide the number of micro-batches: a smaller
    last group would let a forward wait for a backward that waits for it.)

Where they are V-shaped (zbv, arXiv 2401.10241, and dualpipev, the DualPipe of arXiv 2412.19437 cut in half), a rank
passes through the phases written below. These need about 2p micro-batches: with fewer, those that are missing are left
out of a plan for 2p.
"""

from __future__ import annotations

from collections import Counter, deque
from itertools import pairwise

from megalm.parallel.pipeline.plan import Action, Op, Orders, Placement, Schedule, looped, v_shaped

LOOPED: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved", "looped-bfs", "zb-h1", "interleaved-zb")
V_SHAPED: tuple[Schedule, ...] = ("zbv", "dualpipev")
SPLIT: tuple[Schedule, ...] = ("zb-h1", "interleaved-zb", "zbv", "dualpipev")
"""Those that leave weight gradients for later."""


def templates(placement: Placement) -> tuple[Schedule, ...]:
    """The schedules that fit stages placed so."""
    ranks = max(placement) + 1
    if len(placement) == ranks:
        return "gpipe", "1f1b", "zb-h1"
    if placement == v_shaped(ranks):
        return V_SHAPED
    return "interleaved", "looped-bfs", "interleaved-zb"


def compute_orders(schedule: Schedule, placement: Placement, micro_batches: int, forward_only: bool = False) -> Orders:
    """Each rank's F, B, I and W in order, for any number of micro-batches. `schedule` is a template, not `auto`;
    one stage's order is always F0 B0 F1 B1 ..., which keeps one micro-batch at a time."""
    ranks = max(placement) + 1
    if len(placement) == 1:
        schedule = "1f1b"
    if placement == looped(ranks, len(placement) // ranks):
        return tuple(_looped(schedule, placement, rank, micro_batches, forward_only) for rank in range(ranks))
    rank_order = _v_forward if forward_only else {"zbv": _zbv, "dualpipev": _dualpipev}[schedule]
    return tuple(
        tuple(action for action in rank_order(rank, ranks, micro_batches) if action.micro_batch < micro_batches)
        for rank in range(ranks)
    )


def _looped(
    schedule: Schedule, placement: Placement, rank: int, micro_batches: int, forward_only: bool
) -> tuple[Action, ...]:
    ranks = max(placement) + 1
    stages = range(rank, len(placement), ranks)
    groups = 1 if schedule in ("gpipe", "looped-bfs") else max(1, micro_batches // ranks)
    bounds = [micro_batches * group // groups for group in range(groups + 1)]
    size = -(-micro_batches // groups)

    def passes(op: Op, stages: range) -> list[Action]:
        return [Action(op, s, i) for a, b in pairwise(bounds) for s in stages for i in range(a, b)]

    forwards = passes(Op.FORWARD, stages)
    if forward_only:
        return tuple(forwards)
    split = schedule in SPLIT and ranks > 1
    backwards = passes(Op.INPUT_GRADIENT if split else Op.BACKWARD, stages[::-1])
    after = ranks - 1 - rank
    # a backward of two chunks is twice as far away, unless it is split: then weight gradients give way
    warmup = size * (len(stages) - 1) + after * (1 if split or len(stages) == 1 else 2)
    if schedule in ("gpipe", "looped-bfs"):
        warmup = len(forwards)
    order = forwards[:warmup]
    for done, backward in enumerate(backwards):
        order += forwards[warmup + done : warmup + done + 1]
        order.append(backward)
        if split and done >= rank:
            order.append(_weights(backwards[done - rank]))
    return (*order, *map(_weights, backwards[max(0, len(backwards) - rank) :] if split else ()))


def _weights(backward: Action) -> Action:
    return Action(Op.WEIGHT_GRADIENT, backward.stage, backward.micro_batch)


class _Chunks:
    """Writes a rank's actions on its two chunks, 0 on the way down and 1 on the way up, each in micro-batch order."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.order: list[Action] = []
        self.stages = rank, 2 * ranks - 1 - rank
        self.done: Counter[tuple[Op, int]] = Counter()
        self.waiting: deque[Action] = deque()

    def add(self, op: Op, chunk: int) -> None:
        self.order.append(Action(op, self.stages[chunk], self.done[op, chunk]))
        self.done[op, chunk] += 1

    def forward(self, *chunks: int) -> None:
        for chunk in chunks:
            self.add(Op.FORWARD, chunk)

    def backward(self, chunk: int) -> None:
        self.done[Op.INPUT_GRADIENT, chunk] += 1
        self.add(Op.BACKWARD, chunk)

    def input_gradient(self, chunk: int) -> None:
        self.done[Op.BACKWARD, chunk] += 1
        self.add(Op.INPUT_GRADIENT, chunk)
        self.waiting.append(_weights(self.order[-1]))

    def weights(self) -> None:
        if self.waiting:
            self.order.append(self.waiting.popleft())


def _zbv(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    c = _Chunks(rank, ranks)
    after, total = ranks - 1 - rank, max(micro_batches, 2 * ranks - 1)
    c.forward(*[0] * (2 * after + 1), *[1, 0] * rank)
    for _ in range(after + 1):
        c.forward(1)
        c.input_gradient(1)
        c.weights()
    while c.done[Op.FORWARD, 1] < total:
        if c.done[Op.FORWARD, 0] < total:
            c.forward(0)
        c.input_gradient(0)
        c.weights()
        c.forward(1)
        c.input_gradient(1)
        c.weights()
    for _ in range(rank):
        c.input_gradient(0)
        c.input_gradient(1)
    for _ in range(after + 1):
        c.input_gradient(0)
        c.weights()
    return [*c.order, *c.waiting]


def _dualpipev(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    c = _Chunks(rank, ranks)
    after, total = ranks - 1 - rank, max(micro_batches, 2 * ranks)
    c.forward(*[0] * 2 * after, *[0, 1] * (rank + 1))
    for _ in range(after):
        c.input_gradient(1)
        c.weights()
        c.forward(1)
    for _ in range(total - 2 * ranks + rank + 1):
        c.forward(0)
        c.backward(1)
        c.forward(1)
        c.backward(0)
    for _ in range(after):
        c.backward(1)
        c.forward(1)
        c.backward(0)
    for turn in range(2 * (rank + 1)):
        (c.backward if turn <= rank else c.input_gradient)((turn + 1) % 2)
    for _ in range(after):
        c.weights()
        c.input_gradient(0)
    return [*c.order, *c.waiting]


def _v_forward(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    c = _Chunks(rank, ranks)
    lead = min(micro_batches, 2 * (ranks - rank) - 1)
    c.forward(*[0] * lead, *[1, 0] * (micro_batches - lead), *[1] * lead)
    return c.order
