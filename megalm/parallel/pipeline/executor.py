"""Runs one rank's part of a plan. It knows nothing of models or data: `forward` does a micro-batch's forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from megalm.parallel.pipeline.plan import Action, Op


def execute(actions: Sequence[Action], forward: Callable[[int], Tensor]) -> None:
    """Runs `actions` in order. `forward(micro_batch)` gives the scalar that the backward pass starts from; gradients
    add up in the parameters' `.grad`."""
    outputs: dict[int, Tensor] = {}
    for action in actions:
        if action.op is Op.FORWARD:
            output = forward(action.micro_batch)
            if output.requires_grad:
                outputs[action.micro_batch] = output
        else:
            outputs.pop(action.micro_batch).backward()
