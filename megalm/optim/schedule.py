"""The learning rate as a pure function of the step.

    wsd      warm-up, flat, then linear decay (MiniCPM, arXiv 2404.06395)      ___
    cosine   warm-up, then half a cosine                                      /   \\
    linear   warm-up, then a straight line                                   /     \\_ min_ratio
    constant warm-up, then flat
"""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_factor(
    kind: Literal["wsd", "cosine", "linear", "constant"],
    step: int,
    steps: int,
    warmup_steps: int,
    decay_steps: int,
    min_ratio: float,
) -> float:
    """Share of the peak at update `step`, counted from 1 to `steps`; the last has `min_ratio` (1 if constant)."""
    if step < warmup_steps:
        return step / warmup_steps
    if kind == "constant":
        return 1.0
    length = decay_steps if kind == "wsd" else steps - warmup_steps
    done = max(0.0, (step - (steps - length)) / length) if length else 0.0
    left = (1 + math.cos(math.pi * done)) / 2 if kind == "cosine" else 1 - done
    return min_ratio + (1 - min_ratio) * left
