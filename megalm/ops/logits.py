"""What a slice of logits gives its loss, and the gradient that it gets: two passes, by the native kernels.

    statistics   largest z, sum of exp(z - largest), the target's z, the sum of all z: one read
    gradient     weight * (exp(z - lse) * (1 + 2 z_loss lse) - hit * onehot - spread) * slope: one read, one write

with z = logit or softcap * tanh(logit / softcap), and slope its derivative. The logits may be a rank's part of the
vocabulary: statistics of several parts combine, and `lse` of the whole makes a part's probabilities right. Each has its
definition in torch beside it, which computes where no native kernel does (`megalm.ops.native`).

Shapes: C tokens, V logits of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalm.ops import native


@torch.library.custom_op("megalm::logit_statistics", mutates_args=())
def logit_statistics(
    logits_CV: Tensor, targets_C: Tensor, softcap: float, wants_sum: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(largest, exponentials, target, sum), float32 or wider [C]: sum of exp(z - largest); the target's z, 0 where the
    target is none of these logits; sum of all z, empty unless wanted. A softcap of 0 is none."""
    _refuse_unlike(logits_CV, targets_C)
    if native.library_for(logits_CV) is None:
        return _reference_statistics(logits_CV, targets_C, softcap, wants_sum)
    logits_CV = logits_CV.contiguous()
    results = _rows(logits_CV, wants_sum)
    if len(logits_CV):
        arguments = (*logits_CV.shape, native.DTYPES[logits_CV.dtype], logits_CV, targets_C.contiguous(), softcap)
        native.call("megalm_cross_entropy_statistics", logits_CV, *arguments, *results)
    return results


@torch.library.custom_op("megalm::logit_gradient_", mutates_args=("logits_CV",))
def logit_gradient_(
    logits_CV: Tensor,
    targets_C: Tensor,
    lse_C: Tensor,
    weight_C: Tensor,
    softcap: float,
    z_loss: float,
    hit: float,
    spread: float,
) -> None:
    """Writes the gradient over the contiguous logits; rows of weight 0 become zeros."""
    _refuse_unlike(logits_CV, targets_C, lse_C, weight_C)
    if native.library_for(logits_CV) is None:
        logits_CV.copy_(_reference_gradient(logits_CV, targets_C, lse_C, weight_C, softcap, z_loss, hit, spread))
        return
    if not logits_CV.is_contiguous():
        raise ValueError(f"logits of {tuple(logits_CV.shape)} are overwritten, so they have to be contiguous")
    lse_C, weight_C, targets_C = lse_C.contiguous(), weight_C.contiguous(), targets_C.contiguous()
    if len(logits_CV):
        native.call(
            "megalm_cross_entropy_backward", logits_CV, *logits_CV.shape, native.DTYPES[logits_CV.dtype], logits_CV,
            targets_C, lse_C, weight_C, softcap, z_loss, hit, spread, logits_CV,
        )  # fmt: skip


@logit_statistics.register_fake
def _(logits_CV: Tensor, targets_C: Tensor, softcap: float, wants_sum: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _rows(logits_CV, wants_sum)


@logit_gradient_.register_fake
def _(logits_CV, targets_C, lse_C, weight_C, softcap, z_loss, hit, spread) -> None:  # type: ignore[no-untyped-def]
    return None


def _refuse_unlike(logits_CV: Tensor, targets_C: Tensor, *rows_C: Tensor) -> None:
    """Raises ValueError where the kernels, which see addresses alone, would read something else."""
    if logits_CV.ndim != 2:
        raise ValueError(f"logits are {tuple(logits_CV.shape)}, not [C, V]")
    wide = native.wide(logits_CV)
    for x, dtype in ((targets_C, torch.int64), *((x, wide) for x in rows_C)):
        if x.shape != logits_CV.shape[:1] or x.dtype != dtype or x.device != logits_CV.device:
            name = "targets" if x is targets_C else "lse or weight"
            wanted = f"{dtype} on {logits_CV.device}"
            raise ValueError(f"{name} is {tuple(x.shape)} of {x.dtype} on {x.device}, not {len(logits_CV)} of {wanted}")


def _rows(logits_CV: Tensor, wants_sum: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    C, wide = len(logits_CV), native.wide(logits_CV)
    largest, exponentials, target = (logits_CV.new_empty(C, dtype=wide) for _ in range(3))
    return largest, exponentials, target, logits_CV.new_empty(C if wants_sum else 0, dtype=wide)


def _capped(logits_CV: Tensor, softcap: float) -> Tensor:
    z_CV = logits_CV.to(native.wide(logits_CV))
    return softcap * torch.tanh(z_CV / softcap) if softcap else z_CV


def _here(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Which targets are among the logits, and these targets, 0 for the others; both [C, 1]."""
    here_C1 = ((targets_C >= 0) & (targets_C < logits_CV.shape[1]))[:, None]
    return here_C1, targets_C[:, None].where(here_C1, 0)


def _reference_statistics(
    logits_CV: Tensor, targets_C: Tensor, softcap: float, wants_sum: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z_CV = _capped(logits_CV, softcap)
    here_C1, column_C1 = _here(logits_CV, targets_C)
    largest_C1 = z_CV.amax(-1, keepdim=True)
    target_C = z_CV.gather(1, column_C1).where(here_C1, 0)[:, 0]
    sum_C = z_CV.sum(-1) if wants_sum else z_CV.new_empty(0)
    return largest_C1[:, 0], (z_CV - largest_C1).exp_().sum(-1), target_C, sum_C


def _reference_gradient(
    logits_CV: Tensor,
    targets_C: Tensor,
    lse_C: Tensor,
    weight_C: Tensor,
    softcap: float,
    z_loss: float,
    hit: float,
    spread: float,
) -> Tensor:
    z_CV = _capped(logits_CV, softcap)
    here_C1, column_C1 = _here(logits_CV, targets_C)
    grad_CV = (z_CV - lse_C[:, None]).exp_() * (1 + 2 * z_loss * lse_C)[:, None] - spread
    grad_CV.scatter_add_(1, column_C1, -hit * here_C1.to(grad_CV.dtype))
    if softcap:
        grad_CV *= 1 - (z_CV / softcap) ** 2
    grad_CV *= weight_C[:, None]
    return grad_CV.masked_fill_(weight_C[:, None] == 0, 0)
