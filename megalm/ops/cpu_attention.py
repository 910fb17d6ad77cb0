"""`megalm.ops.attention` on a CPU's matrix units: the operator around the native module csrc/attention.

`kernels_for` says which of its kernels a processor has for a type and a head dim, and so where `attention` takes them:
`amx` and `avx512_bf16` for bfloat16, `avx512` for float32. Scores and their softmax are float32; only what enters a
matrix product is rounded to the tensors' type. Results are the same bits for any number of threads.

Shapes: T tokens, H query heads, K key/value heads, E head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalm import _attention

WIDEST_HEAD = 256
UNBOUNDED = 2**31 - 1  # the window of attention without one

# For each type that the processor has kernels for. A constant, so that torch.compile can read it.
FASTEST = {
    dtype: names[0]
    for dtype, names in (
        (torch.float32, _attention.kernels(bfloat16=False)),
        (torch.bfloat16, _attention.kernels(bfloat16=True)),
    )
    if names
}


def kernels_for(dtype: torch.dtype, head_dim: int) -> str | None:
    """Name of the fastest kernels for tensors like these on this processor, or None."""
    return FASTEST.get(dtype) if head_dim % 16 == 0 and head_dim <= WIDEST_HEAD else None


def _shape(q_THE: Tensor, k_TKE: Tensor, segments: Tensor, window: int, softcap: float) -> _attention.Shape:
    _, H, E = q_THE.shape
    return _attention.Shape(
        segments.tolist(), H, k_TKE.shape[1], E, min(window or UNBOUNDED, UNBOUNDED), softcap, torch.get_num_threads()
    )


def _addresses(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]


@torch.library.custom_op("megalm::cpu_attention", mutates_args=())
def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, window: int, softcap: float, kernels: str
) -> tuple[Tensor, Tensor]:
    """out_THE of `attention` by these kernels, and float32 [H, T], the log2 of each row's sum of exponentials, which
    the backward pass needs; `window` and `softcap` are 0 for none."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out_THE = torch.empty_like(q)
    lse2_HT = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    shape = _shape(q, k, segments, window, softcap)
    _attention.forward(kernels, shape, _addresses(q, k, v, out_THE, lse2_HT))
    return out_THE, lse2_HT


@torch.library.custom_op("megalm::cpu_attention_backward", mutates_args=())
def cpu_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    out: Tensor,
    lse2: Tensor,
    window: int,
    softcap: float,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `cpu_attention`'s first output; the probabilities are computed again."""
    q, k, v, out, grad_out = (x.contiguous() for x in (q, k, v, out, grad_out))
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    shape = _shape(q, k, segments, window, softcap)
    _attention.backward(kernels, shape, _addresses(q, k, v, out, lse2, grad_out, *grads))
    return grads


@cpu_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, window: int, softcap: float, kernels: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@cpu_attention_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    out: Tensor,
    lse2: Tensor,
    window: int,
    softcap: float,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, segments, ctx.window, ctx.softcap, ctx.kernels = inputs
    out, lse2 = output
    ctx.mark_non_differentiable(lse2)
    ctx.save_for_backward(q, k, v, segments, out, lse2)


def _backward(ctx, grad_out: Tensor, _):  # type: ignore[no-untyped-def]
    grads = torch.ops.megalm.cpu_attention_backward(grad_out, *ctx.saved_tensors, ctx.window, ctx.softcap, ctx.kernels)
    return *grads, None, None, None, None


cpu_attention.register_autograd(_backward, setup_context=_save)
