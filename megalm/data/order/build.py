"""Puts a mixture and a mode together, as a run's config wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megalm.data.dataset import Source, Split
from megalm.data.order.blend import Blend, Mixture, Stage, StagedBlend
from megalm.data.order.megatron import Megatron, MegatronBlend
from megalm.data.order.pieces import Pieces, Places
from megalm.data.order.stateless import Stateless
from megalm.data.order.window import Window
from megalm.errors import UserError


@dataclass(frozen=True)
class OrderOptions:
    """What a run may choose about its order."""

    mode: Literal["stateless", "window", "megatron"] = "stateless"
    window_tokens: int = 2**24
    """Tokens that mode `window` shuffles and packs together."""
    split: str = "969,30,1"
    """Megatron's `--split`, for mode `megatron`."""
    samples: int | None = None
    """Samples of the whole run, which mode `megatron` depends on."""


@dataclass(frozen=True)
class Order:
    """The order of all training samples of a run."""

    mixture: Mixture
    places: Places

    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and rank in it of the samples [first, first + count): what identifies them, both int64[count]."""
        return self.mixture.locate(np.arange(first, first + count))

    def pieces(self, first: int, count: int) -> Pieces:
        """Where the tokens of the samples [first, first + count) lie."""
        return self.places.pieces(*self.locate(first, count))

    def describe(self) -> object:
        """All that decides it but the sources, the seed and the sequence length, as plain JSON values."""
        return [self.mixture.describe(), self.places.describe()]


def build_order(
    sources: Sequence[Source],
    splits: Sequence[Split],
    weights: Sequence[float] | Sequence[Stage],
    sequence_length: int,
    seed: int,
    options: OrderOptions,
) -> Order:
    """The order of the samples of `sources`, blended by their weights or in stages.

    Raises a UserError where a weight cannot be blended, or where Megatron's split leaves no room for what is held out.
    """
    names = [source.name for source in sources]
    if options.mode == "megatron":
        return _megatron(sources, splits, weights, sequence_length, seed, options)
    stages = [part for part in weights if isinstance(part, Stage)]
    mixture = StagedBlend(stages, names) if stages else Blend([w for w in weights if not isinstance(w, Stage)])
    if options.mode == "window":
        tokens = [split.training_tokens for split in splits]
        return Order(mixture, Window(names, sources, tokens, sequence_length, options.window_tokens, seed))
    windows, slack = [split.training for split in splits], [split.slack for split in splits]
    return Order(mixture, Stateless(names, windows, slack, sequence_length, seed))


def _megatron(
    sources: Sequence[Source],
    splits: Sequence[Split],
    weights: Sequence[float] | Sequence[Stage],
    sequence_length: int,
    seed: int,
    options: OrderOptions,
) -> Order:
    plain = [weight for weight in weights if not isinstance(weight, Stage)]
    if options.samples is None or len(plain) != len(sources):
        raise ValueError("order megatron needs the samples of the whole run, and a weight for each source")
    mixture = MegatronBlend(plain, options.samples)
    places = Megatron(sources, mixture.wanted, options.split, sequence_length, seed)
    for source, split, trained in zip(sources, splits, places.training_tokens, strict=True):
        if split.held_out and trained > split.training_tokens:
            raise UserError(
                f"data.split={options.split!r} trains on {trained} tokens of source {source.name!r}, of which the last "
                f"{trained - split.training_tokens} are among its data.validation.samples={split.held_out}: lower the "
                "one or the other"
            )
    return Order(mixture, places)
