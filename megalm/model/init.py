"""Initial weights as a function of (seed, parameter name, global index) and of nothing else.

A matrix is cut into blocks of rows; each block is drawn by its own generator, seeded by a hash of seed, name and block
number. So whoever owns some rows draws the blocks that hold them, and no rank or layout changes a weight. Whoever owns
some columns draws whole rows and keeps its columns; what stands for no row of the parameter (padding) is zero.
"""

from __future__ import annotations

import math

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor

from megalm.config.sections import Model
from megalm.model.transformer import Transformer
from megalm.parallel.part import Part
from megalm.parallel.zero.regions import shard_rows

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
    """Fills all parameters: matrices normal, norms one, biases zero. Those that FSDP has sharded are filled shard by
    shard, so that no rank draws what it does not hold."""
    for name, parameter in model.named_parameters():
        part = model.parts[name]
        if isinstance(parameter, DTensor):
            shards, last = parameter.device_mesh, parameter.device_mesh.ndim - 1
            first, _ = shard_rows(len(parameter), shards.size(last), shards.get_local_rank(last))
            fill(parameter.to_local(), model.config, seed, name, part, first)
        else:
            fill(parameter, model.config, seed, name, part)


@torch.no_grad()
def fill(target: Tensor, config: Model, seed: int, name: str, part: Part, first: int = 0) -> None:
    """Fills `target`, the rows of `part` from row `first` on, with the initial values of the parameter `name`."""
    if target.ndim == 1:
        target.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        return
    column, width, std = part.offset[1], part.size[1], initial_std(config, name)
    rows = max(0, min(len(target), part.size[0] - first))
    target[rows:] = 0
    # A slice at a time, so that the CPU copy of a large matrix stays small.
    for start in range(0, rows, 16 * ROWS):
        count = min(16 * ROWS, rows - start)
        whole = normal_rows(seed, name, part.offset[0] + first + start, count, part.shape[1], std)
        target[start : start + count].copy_(whole[:, column : column + width])
