"""Is there enough of each source? What a run wants of it, counted before the run, against what is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalm.data.order import Mixture
from megalm.errors import UserError


@dataclass(frozen=True)
class Need:
    """What a run takes of one source."""

    name: str
    share: float
    """Of all the run's tokens."""
    wanted: int
    """Tokens."""
    there: int
    """Training tokens in an epoch."""
    max_epochs: float | None
    """The most epochs that the user allows."""

    @property
    def epochs(self) -> float:
        """How often the run goes through the source."""
        return self.wanted / self.there

    @property
    def fits(self) -> bool:
        """Whether the cap on epochs is kept."""
        return self.max_epochs is None or self.epochs <= self.max_epochs


def token_needs(
    mixture: Mixture,
    epoch_samples: np.ndarray,
    samples: int,
    sequence_length: int,
    names: Sequence[str],
    max_epochs: Sequence[float | None],
) -> list[Need]:
    """The needs of a run of `samples` samples; `epoch_samples` are those of an epoch of each source."""
    rows = zip(names, mixture.drawn(samples).tolist(), epoch_samples.tolist(), max_epochs, strict=True)
    return [
        Need(name, drawn / max(samples, 1), drawn * sequence_length, there * sequence_length, cap)
        for name, drawn, there, cap in rows
    ]


def refuse_unmet(needs: Sequence[Need]) -> None:
    """A UserError that names the first source of which more is wanted than its `max_epochs` allow."""
    unmet = [need for need in needs if not need.fits]
    if not unmet:
        return
    need = unmet[0]
    cap = need.max_epochs or 0.0
    more = f" (and {len(unmet) - 1} more)" if len(unmet) > 1 else ""
    raise UserError(
        f"data.sources: the run wants {need.wanted:,} tokens of {need.name!r}, {need.epochs:.2f} epochs of the "
        f"{need.there:,} that are there, and max_epochs={cap:g}: prepare {need.wanted / cap - need.there:,.0f} tokens "
        f"more, lower its share from {need.share:.3g} to {need.share * cap / need.epochs:.3g}, raise max_epochs to "
        f"{math.ceil(100 * need.epochs) / 100:g}, or shorten the run{more}"
    )


def table(needs: Sequence[Need]) -> list[str]:
    """Source, share, tokens wanted, tokens there and epochs of each need, as aligned lines under a title."""
    rows = [("source", "weight", "tokens wanted", "tokens there", "epochs")]
    for need in needs:
        cap = "" if need.max_epochs is None else f" of {need.max_epochs:g}"
        rows.append((need.name, f"{need.share:.2%}", f"{need.wanted:,}", f"{need.there:,}", f"{need.epochs:.2f}{cap}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))])
        for name, *numbers in rows
    ]
