"""The embedding and the output head, whose rows are shared by the ranks of the tensor axis.

    vocabulary 10 on 4 ranks      0 1 | 2 3 4 | 5 6 | 7 8 9        rank r has the rows [10 r / 4, 10 (r + 1) / 4)

All ranks' matrices are equally tall: where the vocabulary does not divide, some have a row of zeros at the end. It is
never looked up and takes part in no product, so that it stays zero.

Shapes: R rows of this rank between the layers, T rows of all, D hidden.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.ops.cross_entropy import VocabShard, linear_cross_entropy
from megalm.parallel.collectives import each_rank, gather_rows, scatter_sum_rows, start_gather, sum_ranks, wait
from megalm.parallel.part import Part
from megalm.parallel.tensor.axis import TensorParallel


class VocabularyMatrix(nn.Module):
    """This rank's rows of a matrix [vocabulary, width], as an embedding or as the head. `primary` says whether it is
    the copy that is counted and saved."""

    def __init__(self, tp: TensorParallel, vocabulary: int, width: int, primary: bool = True) -> None:
        super().__init__()
        self.tp, self.vocabulary = tp, vocabulary
        size, rank = tp.axis.size, tp.axis.rank
        firsts = [vocabulary * i // size for i in range(size + 1)]
        self.first, self.shares = firsts[rank], [end - first for first, end in pairwise(firsts)]
        self.rows = self.shares[rank]
        self.parts = {"weight": Part((vocabulary, width), (self.first, 0), (self.rows, width), primary=primary)}
        self.weight = nn.Parameter(torch.empty(-(-vocabulary // size), width))

    def forward(self, tokens_T: Tensor, dtype: torch.dtype) -> Tensor:
        """The tokens' rows x_RD in `dtype`."""
        if self.tp.axis.size == 1:
            return F.embedding(tokens_T, self.weight).to(dtype)
        row_T = tokens_T - self.first
        mine_T = (row_T >= 0) & (row_T < self.rows)
        x_TD = F.embedding(row_T.where(mine_T, 0), self.weight).to(dtype) * mine_T[:, None]
        return (scatter_sum_rows if self.tp.sequence else sum_ranks)(x_TD, self.tp.axis)

    def cross_entropy(
        self,
        x_RD: Tensor,
        labels_T: Tensor,
        counted_T: Tensor,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        smoothing: float = 0.0,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """`linear_cross_entropy` with this matrix as the head; each rank gets the whole sums.

        The weight's gradient is computed with the loss: a split backward pass has nothing left to do here.
        """
        axis = self.tp.axis
        x_TD = (gather_rows if self.tp.sequence else each_rank)(x_RD, axis)
        shard = None
        if axis.size > 1:

            def stacked(x: Tensor) -> Tensor:
                return wait(start_gather(x[None], axis))

            shard = VocabShard(self.first, self.rows, self.vocabulary, stacked)
        pool = None if self.tp.queue is None else self.tp.queue.pool
        return linear_cross_entropy(
            x_TD, self.weight, labels_T, counted_T, z_loss, softcap, scale, smoothing=smoothing, shard=shard, pool=pool
        )

    def logits(self, x_TD: Tensor) -> Tensor:
        """x W^T with all rows of the vocabulary, on each rank; where these are several, gradients do not flow back."""
        logits_TV = F.linear(x_TD, self.weight.to(x_TD.dtype))
        if self.tp.axis.size == 1:
            return logits_TV
        logits_NTV = wait(start_gather(logits_TV[None], self.tp.axis))
        return torch.cat([part[:, :rows] for part, rows in zip(logits_NTV, self.shares, strict=True)], 1)
