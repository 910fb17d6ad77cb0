"""What each pipeline rank does in one step, as data: lists of actions, made before the step and run by the executor.

A model is cut into `stages` along its layers; a placement says which rank holds which stages (several are its chunks).
An action is one operation of one stage on one micro-batch:

    F forward      B backward whole          I input gradient only      W the weight gradient that I left
    >F <F          activations to the next stage, from the one before  (sent by the stage named, received by it)
    >B <B          their gradients, to the stage before, from the next
    R              the stage's gradients are complete: reduce them over the data ranks
    T              tied weights: add the gradients of the first stage's and the last one's copy

One stage is the plan for no pipeline: each micro-batch goes forward and straight back, so that one micro-batch's
activations are alive at a time and gradients add up (gradient accumulation): F0 B0 F1 B1 ...; for evaluation F0 F1 ...
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum

from megalm.config.sections import PipelineSchedule as Schedule


class Op(Enum):
    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"
    SEND_ACTIVATION = ">F"
    RECEIVE_ACTIVATION = "<F"
    SEND_GRADIENT = ">B"
    RECEIVE_GRADIENT = "<B"
    REDUCE = "R"
    TIED = "T"


COMPUTE = (Op.FORWARD, Op.BACKWARD, Op.INPUT_GRADIENT, Op.WEIGHT_GRADIENT)
BACKWARDS = (Op.BACKWARD, Op.INPUT_GRADIENT)
WEIGHTS = (Op.BACKWARD, Op.WEIGHT_GRADIENT)
SENDS = (Op.SEND_ACTIVATION, Op.SEND_GRADIENT)
RECEIVES = (Op.RECEIVE_ACTIVATION, Op.RECEIVE_GRADIENT)


@dataclass(frozen=True, slots=True)
class Action:
    """One operation of one stage; `micro_batch` is -1 for REDUCE and TIED, which are of all."""

    op: Op
    stage: int
    micro_batch: int = -1

    def __str__(self) -> str:
        return f"{self.op.value}{self.stage}" + (f".{self.micro_batch}" if self.micro_batch >= 0 else "")


def parse_action(text: str) -> Action:
    """The inverse of `str(action)`; raises ValueError for anything else."""
    place = text.lstrip("".join(op.value for op in Op))
    stage, _, micro_batch = place.partition(".")
    return Action(Op(text.removesuffix(place)), int(stage), int(micro_batch or -1))


Plan = tuple[tuple[Action, ...], ...]
"""For each pipeline rank, its actions in order."""

Placement = tuple[int, ...]
"""For each stage, in the order of the layers, the pipeline rank that holds it."""


Orders = tuple[tuple[Action, ...], ...]
"""A plan before it is lowered: for each pipeline rank its F, B, I and W in order."""


class PlanError(ValueError):
    """A plan that breaks a law; says which and where."""


def looped(ranks: int, chunks: int) -> Placement:
    """Rank r holds the stages r, r + ranks, r + 2 ranks, ..."""
    return tuple(range(ranks)) * chunks


def v_shaped(ranks: int) -> Placement:
    """Down and back up: rank r holds the stages r and 2 ranks - 1 - r, so rank 0 has the first and the last."""
    return (*range(ranks), *reversed(range(ranks)))


def placement_of(schedule: Schedule, ranks: int, chunks: int) -> Placement:
    """Where a schedule has its stages. It depends on nothing that changes during a run."""
    return v_shaped(ranks) if ranks > 1 and schedule in ("zbv", "dualpipev") else looped(ranks, chunks)


def in_flight(orders: Orders) -> list[int]:
    """For each stage, the most micro-batches whose activations it keeps at once."""
    alive: Counter[int] = Counter()
    most: Counter[int] = Counter()
    for action in (action for order in orders for action in order):
        alive[action.stage] += (action.op is Op.FORWARD) - (action.op in WEIGHTS)
        most[action.stage] = max(most[action.stage], alive[action.stage])
    return [most[stage] for stage in range(len(most))]


def peer(op: Op, stage: int, placement: Placement) -> int:
    """The pipeline rank at the other end of a send or receive."""
    return placement[stage + (1 if op in (Op.SEND_ACTIVATION, Op.RECEIVE_GRADIENT) else -1)]


def goes_down(source: int, target: int, ranks: int) -> bool:
    """Whether a message from rank `source` to its neighbour `target` belongs to the group `down` (to the next rank; the
    last one's next is the first), not `up`. A group carries messages one way only between two ranks; if there are but
    two, which are neighbours both ways, the first sends down."""
    return target == (source + 1) % ranks and (ranks > 2 or source < target)
