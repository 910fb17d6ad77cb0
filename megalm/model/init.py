"""Initial weights as a function of (seed, parameter name, global index) and of nothing else.

A matrix is cut into blocks of rows; each block is drawn by its own generator, seeded by a hash of seed, name and block
number. So whoever owns some rows draws the blocks that hold them, and no rank or layout changes a weight.
"""

from __future__ import annotations

import math

import torch
import xxhash
from torch import Tensor

from megalm.config.sections import Model
from megalm.model.transformer import Transformer

ROWS = 256  # rows a block


def normal_rows(seed: int, name: str, first: int, count: int, width: int, std: float) -> Tensor:
    """Rows [first, first + count) of the normally distributed float32 matrix `name`, drawn on the CPU."""
    blocks = []
    for block in range(first // ROWS, -(-(first + count) // ROWS)):
        key = xxhash.xxh3_64_intdigest(f"{seed}/{name}/{block}".encode())
        generator = torch.Generator().manual_seed(key >> 1)
        blocks.append(torch.empty(ROWS, width).normal_(0.0, std, generator=generator))
    offset = first % ROWS
    return torch.cat(blocks)[offset : offset + count] if blocks else torch.empty(0, width)


def initial_std(config: Model, name: str) -> float:
    """The standard deviation of a matrix: smaller for those that write to the residual stream (GPT-2, section 2.3)."""
    writes_residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
    return config.init_std / math.sqrt(2 * config.num_layers) if writes_residual else config.init_std


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Fills all parameters: matrices normal, norms one, biases zero."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            rows, width = parameter.shape
            # A slice at a time, so that the CPU copy of a large matrix stays small.
            for first in range(0, rows, 16 * ROWS):
                count = min(16 * ROWS, rows - first)
                part = normal_rows(seed, name, first, count, width, initial_std(model.config, name))
                parameter[first : first + count].copy_(part)
        else:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
