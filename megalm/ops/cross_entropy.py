"""Output head and softmax cross-entropy together, a slice of tokens at a time: the T×V logits never exist.

For a slice of C tokens: z = x W^T, optionally z <- cap tanh(z / cap); lse = log sum exp z;

    objective = scale * sum over counted tokens of (lse - z[label]) + z_loss * lse^2
    d objective / dz = scale * (softmax(z) * (1 + 2 z_loss lse) - onehot(label)) * counted

The gradients of x and W are computed in the forward pass, while the slice's logits are at hand, so nothing is computed
twice; beside the gradients themselves, the memory is that of one slice. z-loss: PaLM, section 5 (arXiv 2204.02311).

Shapes: T tokens, C tokens of a slice, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SLICE_LOGITS = 1 << 22  # logits of a slice: some megabytes, which stay in a CPU's last-level cache
GPU_SLICE_LOGITS = 1 << 27  # half a gigabyte in float32: thin slices would spend their time on adding up W's gradient
MIN_SLICE = 256  # tokens; fewer would make the matrix products thin


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    counted_T: Tensor,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sums over the tokens where `counted_T` (bool) is true; float32 scalars.

    Returns (objective, cross_entropy): the first, times `scale` and z-loss included, is to be differentiated; the
    second, in nats, is for reports and has neither scale nor gradient. The product is computed in x's type, the softmax
    in float32 (or x's type if wider). `scale` is given here because it is exact in the float32 gradient of the logits,
    and would be rounded if a bfloat16 gradient of x were multiplied by it.
    """
    wants_grad = torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, counted_T, z_loss, softcap, scale, wants_grad)


def reference_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    counted_T: Tensor,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `linear_cross_entropy`, with all logits at once."""
    logits_TV = F.linear(x_TD, weight_VD)
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    loss_T = F.cross_entropy(logits_TV, labels_T, reduction="none")[counted_T]
    z_T = z_loss * logits_TV.logsumexp(-1)[counted_T] ** 2
    return (loss_T + z_T).sum(), loss_T.sum().detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_VD, labels_T, counted_T, z_loss, softcap, scale, wants_grad):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        w_VD = weight_VD.to(x_TD.dtype)
        if wants_grad:
            grad_x_TD = torch.empty_like(x_TD)
            # Slices add up in the weight's own (wide) type.
            grad_w_VD = torch.zeros_like(weight_VD)
        objective, cross_entropy = x_TD.new_zeros(2, dtype=wide)
        rows = max(MIN_SLICE, (GPU_SLICE_LOGITS if x_TD.is_cuda else SLICE_LOGITS) // len(w_VD))
        for start in range(0, len(x_TD), rows):
            part = slice(start, start + rows)
            x_CD, labels_C1, counted_C = x_TD[part], labels_T[part, None], counted_T[part]
            z_CV = F.linear(x_CD, w_VD)
            if softcap is not None:
                z_CV = softcap * torch.tanh(z_CV / softcap)
            p_CV = torch.softmax(z_CV, -1, dtype=wide)
            # lse by way of the largest logit, whose probability cannot underflow.
            lse_C = z_CV.amax(-1).to(wide) - p_CV.amax(-1).log()
            loss_C = lse_C - z_CV.gather(1, labels_C1)[:, 0]
            cross_entropy += loss_C.where(counted_C, 0).sum()
            objective += (loss_C + z_loss * lse_C**2).where(counted_C, 0).sum()
            if not wants_grad:
                continue
            if z_loss:
                p_CV *= (1 + 2 * z_loss * lse_C)[:, None]
            p_CV.scatter_add_(1, labels_C1, p_CV.new_full((), -1).expand_as(labels_C1))
            p_CV *= scale * counted_C[:, None]
            grad_z_CV = p_CV.to(x_TD.dtype)
            if softcap is not None:
                grad_z_CV *= 1 - (z_CV / softcap) ** 2
            torch.mm(grad_z_CV, w_VD, out=grad_x_TD[part])
            grad_w_VD += torch.mm(grad_z_CV.t(), x_CD)
        if wants_grad:
            ctx.save_for_backward(grad_x_TD, grad_w_VD)
        ctx.mark_non_differentiable(cross_entropy)
        return objective * scale, cross_entropy

    @staticmethod
    def backward(ctx, grad_objective, _):  # type: ignore[no-untyped-def]
        grad_x_TD, grad_w_VD = ctx.saved_tensors
        return grad_x_TD * grad_objective.to(grad_x_TD.dtype), grad_w_VD * grad_objective, *[None] * 6
