"""Output head and softmax cross-entropy together, a slice of tokens at a time: the T×V logits never exist.

For a slice of C tokens: z = x W^T, optionally z <- cap tanh(z / cap); lse = log sum exp z; with label smoothing e

    objective = scale * sum over counted tokens of (lse - (1 - e) z[label] - e mean z) + z_loss * lse^2
    d objective / dz = scale * (softmax(z) * (1 + 2 z_loss lse) - (1 - e) onehot(label) - e / V) * counted

The gradients of x and W are computed in the forward pass, while the slice's logits are at hand, so nothing is computed
twice; beside the gradients themselves, the memory is that of one slice. z-loss: PaLM, section 5 (arXiv 2204.02311);
label smoothing: arXiv 1512.00567, section 7.

Where several ranks share W's rows, each has the logits of its own: lse is the log-sum-exp of the ranks' lse, and a
token's softmax is the rank's own times exp(own lse - lse). So two numbers a token travel, once a slice (three with
smoothing).

Shapes: T tokens, C tokens of a slice, D hidden, V vocabulary (of this rank, where it is shared).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.ops import native
from megalm.ops.logits import logit_gradient_, logit_statistics

SLICE_LOGITS = 1 << 23  # logits of a slice: some megabytes, which stay in a CPU's last-level cache
GPU_SLICE_LOGITS = 1 << 27  # half a gigabyte in float32: thin slices would spend their time on adding up W's gradient
MIN_SLICE = 384  # tokens; with fewer, adding up the slices' gradients of W would take as long as computing them


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the head a rank has: `rows` from number `first` of `vocabulary`. Its weight may have more rows, as
    many on each rank, which stand for no token."""

    first: int
    rows: int
    vocabulary: int
    stacked: Callable[[Tensor], Tensor]
    """All ranks' tensors along a new first dim."""


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    counted_T: Tensor,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    *,
    smoothing: float = 0.0,
    shard: VocabShard | None = None,
    pool: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums over the tokens where `counted_T` (bool) is true; float32 scalars.

    Returns (objective, cross_entropy): the first, times `scale`, smoothing and z-loss included, is to be
    differentiated; the second, in nats, is for reports and has none of these and no gradient. The product is computed
    in x's type, the softmax in float32 (or x's type if wider). `scale` is given here because it is exact in the float32
    gradient of the logits, and would be rounded if a bfloat16 gradient of x were multiplied by it. With `shard`,
    `weight_VD` is a rank's part, all ranks get the same sums, and x's gradient is what the rank's rows add to it.

    The gradient of the weight is held from here to the backward pass, for each call one; calls that share a list as
    `pool` hold their sum, which the first backward pass among them gives. They must all be differentiated alike.
    """
    wants_grad = torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(
        x_TD, weight_VD, labels_T, counted_T, z_loss, softcap, scale, smoothing, shard, wants_grad, pool
    )


def reference_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    counted_T: Tensor,
    z_loss: float = 0.0,
    softcap: float | None = None,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The definition of `linear_cross_entropy`, with all logits at once."""
    logits_TV = F.linear(x_TD, weight_VD)
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    loss_T = F.cross_entropy(logits_TV, labels_T, reduction="none", label_smoothing=smoothing)[counted_T]
    z_T = z_loss * logits_TV.logsumexp(-1)[counted_T] ** 2
    nats = F.cross_entropy(logits_TV[counted_T], labels_T[counted_T], reduction="sum")
    return (loss_T + z_T).sum(), nats.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_VD, labels_T, counted_T, z_loss, softcap, scale, smoothing, shard, wants_grad, pool):  # type: ignore[no-untyped-def]
        wide = native.wide(x_TD)
        rows = len(weight_VD) if shard is None else shard.rows
        vocabulary = rows if shard is None else shard.vocabulary
        w_VD = weight_VD[:rows].to(x_TD.dtype)
        if wants_grad:
            grad_x_TD = torch.empty_like(x_TD)
            # Slices add up in a wide type.
            grad_w_VD = torch.zeros_like(weight_VD, dtype=native.wide(weight_VD))
            product_VD = None if grad_w_VD.dtype == x_TD.dtype else torch.empty_like(w_VD)
        objective, cross_entropy = x_TD.new_zeros(2, dtype=wide)
        # The same slices on all ranks: the padded height is the same.
        tokens = max(MIN_SLICE, (GPU_SLICE_LOGITS if x_TD.is_cuda else SLICE_LOGITS) // len(weight_VD))
        for start in range(0, len(x_TD), tokens):
            part = slice(start, start + tokens)
            x_CD, counted_C, row_C = x_TD[part], counted_T[part], labels_T[part]
            if shard is not None:
                row_C = row_C - shard.first
            z_CV = F.linear(x_CD, w_VD)
            largest_C, exponentials_C, target_C, sum_C = logit_statistics(z_CV, row_C, softcap or 0.0, smoothing > 0)
            lse_C = largest_C + exponentials_C.log()
            if shard is not None:
                lse_C, target_C, sum_C = _of_all_ranks(shard, lse_C, target_C, sum_C if smoothing else None)
            nats_C = lse_C - target_C
            loss_C = nats_C + z_loss * lse_C**2
            if smoothing:
                loss_C += smoothing * (target_C - sum_C / vocabulary)
            cross_entropy += nats_C.where(counted_C, 0).sum()
            objective += loss_C.where(counted_C, 0).sum()
            if not wants_grad:
                continue
            weight_C = scale * counted_C.to(wide)
            spread = smoothing / vocabulary
            logit_gradient_(z_CV, row_C, lse_C, weight_C, softcap or 0.0, z_loss, 1 - smoothing, spread)
            torch.mm(z_CV, w_VD, out=grad_x_TD[part])
            if product_VD is None:
                torch.addmm(grad_w_VD[:rows], z_CV.t(), x_CD, out=grad_w_VD[:rows])
            else:
                grad_w_VD[:rows] += torch.mm(z_CV.t(), x_CD, out=product_VD)
        if wants_grad:
            ctx.weight_dtype, ctx.pool = weight_VD.dtype, pool
            ctx.save_for_backward(grad_x_TD, grad_w_VD if pool is None else None)
            if pool:
                pool[0] += grad_w_VD
            elif pool is not None:
                pool.append(grad_w_VD)
        ctx.mark_non_differentiable(cross_entropy)
        return objective * scale, cross_entropy

    @staticmethod
    def backward(ctx, grad_objective, _):  # type: ignore[no-untyped-def]
        grad_x_TD, grad_w_VD = ctx.saved_tensors
        if ctx.pool:
            grad_w_VD = ctx.pool.pop()
        if grad_w_VD is not None:
            grad_w_VD = (grad_w_VD * grad_objective).to(ctx.weight_dtype)
        return grad_x_TD * grad_objective.to(grad_x_TD.dtype), grad_w_VD, *[None] * 9


def _of_all_ranks(
    shard: VocabShard, lse_C: Tensor, target_C: Tensor, sum_C: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-sum-exp, the label's logit and the sum of logits over the whole vocabulary, from those of the rank's rows."""
    own = [lse_C, target_C] if sum_C is None else [lse_C, target_C, sum_C]
    lse_NC, *sums_NC = shard.stacked(torch.stack(own)).unbind(1)
    target_C, *rest = (x_NC.sum(0) for x_NC in sums_NC)
    return lse_NC.logsumexp(0), target_C, rest[0] if rest else None
