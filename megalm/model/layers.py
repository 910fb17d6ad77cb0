"""The layers that no rank shares with another. Parameters are float32 masters; each layer computes in the type of its
input and casts its parameters to that type on the way in, so that gradients arrive in float32.

`partial` of a norm: each tensor rank sees rows (or heads) of its own, so that the gradients have to be summed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.ops import native
from megalm.parallel.tensor.axis import TensorParallel


class PositionEmbedding(nn.Module):
    """Rows of a table, given in `dtype`."""

    def __init__(self, tp: TensorParallel, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))
        self.parts = {"weight": tp.copied(rows, width, partial=tp.sequence)}

    def forward(self, index_R: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(index_R, self.weight).to(dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * w over the last dim (arXiv 1910.07467), computed in float32 or wider."""

    def __init__(self, tp: TensorParallel, width: int, eps: float, partial: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.parts = {"weight": tp.copied(width, partial=partial)}
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(native.wide(x))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * w + b over the last dim (arXiv 1607.06450), computed in float32 or wider."""

    def __init__(self, tp: TensorParallel, width: int, eps: float, partial: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.parts = {name: tp.copied(width, partial=partial) for name in ("weight", "bias")}
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(native.wide(x))
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, self.weight.shape, weight, bias, self.eps).to(x.dtype)
