"""What a pipeline rank does in one step, as data: a list of actions, made before the step and run by the executor.

One stage is the plan for no pipeline: each micro-batch goes forward and straight back, so that one micro-batch's
activations are alive at a time and gradients add up (gradient accumulation): F0 B0 F1 B1 ...; for evaluation F0 F1 ...
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Op(Enum):
    FORWARD = "F"
    BACKWARD = "B"


@dataclass(frozen=True, slots=True)
class Action:
    """One operation on one micro-batch by one stage."""

    op: Op
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.op.value}{self.micro_batch}"


Plan = tuple[tuple[Action, ...], ...]
"""For each pipeline rank, its actions in order."""


def one_stage_plan(micro_batches: int, forward_only: bool = False) -> Plan:
    """The plan of the one rank that holds the whole model."""
    ops = (Op.FORWARD,) if forward_only else (Op.FORWARD, Op.BACKWARD)
    return (tuple(Action(op, 0, i) for i in range(micro_batches) for op in ops),)
