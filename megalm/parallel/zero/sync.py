"""What the executor asks of data parallelism, for one stage of the model."""

from __future__ import annotations

from typing import Protocol


class GradientSync(Protocol):
    """Called by the executor in this order in each step; nothing in it may block but `finish`. A step of forward passes
    alone, as in evaluation, calls `begin` and `finish`."""

    def begin(self) -> None:
        """Before the stage's first action of a step."""

    def before_backward(self, last: bool, deferred: bool) -> None:
        """Before a micro-batch's backward pass: `last` if no gradient of the step is still to come after it, nor any
        deferred one; with its weight gradients `deferred` or not. A last one that is not deferred reduces while it
        runs."""

    def after_weights(self, last: bool) -> None:
        """After deferred weight gradients of one micro-batch were computed; `last` of the step or not."""

    def reduce(self) -> None:
        """All gradients of the stage are complete: what is not yet being reduced begins to be."""

    def finish(self) -> None:
        """Waits; after it each parameter's `.grad` is the sum over all data ranks, and parameters are at rest: they may
        be updated, saved or loaded."""


class NoSync:
    """That of one data rank, whose gradients are whole as they are."""

    def begin(self) -> None:
        pass

    def before_backward(self, last: bool, deferred: bool) -> None:
        pass

    def after_weights(self, last: bool) -> None:
        pass

    def reduce(self) -> None:
        pass

    def finish(self) -> None:
        pass
