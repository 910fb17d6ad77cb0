"""What the executor asks of data parallelism, for one stage of the model."""

from __future__ import annotations

from typing import Protocol


class GradientSync(Protocol):
    """Called by the executor in this order in each step; nothing in it may block but `finish`."""

    def begin(self) -> None:
        """Before the stage's first action of a step."""

    def before_backward(self, last: bool, deferred: bool) -> None:
        """Before a micro-batch's backward pass: `last` of the step or not; with its weight gradients `deferred` or not.
        A last one that is not deferred reduces while it runs."""

    def after_weights(self, last: bool) -> None:
        """After deferred weight gradients of one micro-batch were computed."""

    def reduce(self) -> None:
        """All gradients of the stage are complete: what is not yet being reduced begins to be."""

    def finish(self) -> None:
        """Waits; after it each parameter's `.grad` is the sum over all data ranks."""
