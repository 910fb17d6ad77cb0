"""Documents of any lengths through the model together, packed end to end, each a segment of its own: no padding.

    documents      0 abc   1 de   2 fghi   3 j              number i belongs to data rank i mod their count
    data rank 0    [abc|fghi]     data rank 1  [de|j]       micro-batches of at most TOKENS tokens, or one document
    last stage     numbers of each document, from the logits of its last rows, summed over all ranks

Every rank is given the same documents and gets the numbers of all. All data ranks take as many micro-batches through
(ZeRO 3 gathers layers together): who has fewer reads a token that nobody asked for.

Shapes: T tokens, C rows whose logits are looked at together, V vocabulary, N parts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.config.sections import known
from megalm.model.transformer import Cache, ModelInputs, Transformer
from megalm.ops.cross_entropy import GPU_SLICE_LOGITS, SLICE_LOGITS
from megalm.train.passes import Passes

TOKENS = 8192  # of a micro-batch
GROUP = 32  # micro-batches that one plan takes through the model


@dataclass(frozen=True)
class Part:
    """Tokens of a document, at least one, that go through the model together."""

    document: int
    tokens: Sequence[int]
    wanted: int = 1
    """The last so many rows are looked at."""
    first: int = 0
    """Position of the first token."""
    cache: Cache | None = None
    """What came before; all parts that are read together have one, or none has."""


Row = tuple[int, int]
"""Which part, and which of its wanted rows."""
Judge = Callable[[Tensor, list[Row]], Tensor]
"""(logits_CV, the C rows) -> what adds up to the parts' numbers, float64 [C, numbers]."""


def read(passes: Passes, parts: Sequence[Part], judge: Judge, numbers: int) -> list[list[float]]:
    """The numbers of each part. `judge` runs on one rank of those that have the same documents."""
    mesh, device = passes.mesh, passes.mesh.device
    packed = [_pack(parts, rank, mesh.data.size) for rank in range(mesh.data.size)]
    mine, most = packed[mesh.data.rank], max(map(len, packed))
    mine += [[]] * (most - len(mine))
    found_N = torch.zeros(len(parts), numbers, dtype=torch.float64, device=device)
    for start in range(0, most, GROUP):
        group = mine[start : start + GROUP]

        def take(micro_batch: int, stage: Transformer, x_TD: Tensor, group: list[list[int]] = group) -> None:
            numbers_of = group[micro_batch]
            wanted, row_T = _wanted([parts[n] for n in numbers_of])
            rows = [(numbers_of[place], row) for place, row in wanted]
            limit = GPU_SLICE_LOGITS if x_TD.is_cuda else SLICE_LOGITS
            size = max(1, limit // known(stage.config.vocab_size))
            for first in range(0, len(rows), size):
                some = rows[first : first + size]
                logits_CV = stage.logits(x_TD[torch.tensor(row_T[first : first + size], device=device)])
                if passes.predicts:
                    part_C = torch.tensor([number for number, _ in some], device=device)
                    found_N.index_add_(0, part_C, judge(logits_CV, some).to(device))

        with torch.no_grad():
            passes.read([_inputs([parts[n] for n in micro_batch], device) for micro_batch in group], take)
    if mesh.world.group is not None:
        dist.all_reduce(found_N, group=mesh.world.group)
    return found_N.tolist()


def _pack(parts: Sequence[Part], rank: int, ranks: int) -> list[list[int]]:
    """The numbers of a data rank's parts by micro-batch."""
    packed: list[list[int]] = []
    room = 0
    for number, part in enumerate(parts):
        if part.document % ranks != rank:
            continue
        if len(part.tokens) > room:
            packed.append([])
            room = TOKENS
        packed[-1].append(number)
        room -= len(part.tokens)
    return packed


def _wanted(parts: Sequence[Part]) -> tuple[list[Row], list[int]]:
    """The rows that are looked at, by place of the part and number, and by place in the micro-batch."""
    ends = accumulate(len(part.tokens) for part in parts)
    rows = [(place, row) for place, part in enumerate(parts) for row in range(part.wanted)]
    places = [end - part.wanted + row for part, end in zip(parts, ends, strict=True) for row in range(part.wanted)]
    return rows, places


def _inputs(parts: Sequence[Part], device: torch.device) -> ModelInputs:
    parts = parts or [Part(0, [0])]
    tokens_T = torch.tensor([token for part in parts for token in part.tokens], device=device)
    positions_T = torch.cat([torch.arange(part.first, part.first + len(part.tokens)) for part in parts]).to(device)
    ends = torch.tensor([0, *accumulate(len(part.tokens) for part in parts)], dtype=torch.int32)
    caches = [part.cache for part in parts if part.cache is not None]
    return ModelInputs(tokens_T, positions_T, ends, None, None, caches=caches or None)
