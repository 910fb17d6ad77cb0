"""Tied weights: the first and the last stage each have a copy of the embedding, whose gradients are added up."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from megalm.parallel.mesh import Axis
from megalm.parallel.zero.regions import local


def add_tied_gradients(copies: list[nn.Parameter], axis: Axis, ends: tuple[int, int], device: torch.device) -> None:
    """Gives both copies the sum of both gradients, the same to the last bit, so that they stay equal.

    `copies`: this rank's, one or both. `ends`: the pipeline ranks of the first and the last stage on `axis`; both call
    it. Gradients may be sharded, both alike, and rest elsewhere than on `device`, which is the group's.
    """
    mine = []
    for copy in copies:
        assert copy.grad is not None, "both stages use the embedding"
        mine.append(local(copy.grad))
    if len(mine) == 2:
        mine[0].add_(mine[1])
        mine[1].copy_(mine[0])
        return
    (own,) = mine
    sent = own.to(device)
    other = torch.empty_like(sent)
    peer = axis.ranks[ends[0] if axis.rank == ends[1] else ends[1]]
    exchange = [dist.P2POp(dist.isend, sent, peer, axis.group), dist.P2POp(dist.irecv, other, peer, axis.group)]
    for work in dist.batch_isend_irecv(exchange):
        work.wait()
    own.add_(other.to(own.device))  # a + b and b + a are the same number
