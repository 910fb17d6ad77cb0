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

# For each type, those that the processor has, the fastest first. A constant, so that torch.compile can read it.
KERNELS = {
    torch.float32: _attention.kernels(bfloat16=False),
    torch.bfloat16: _attention.kernels(bfloat16=True),
}


def kernels_for(dtype: torch.dtype, head_dim: int) -> str | None:
    """Name of the fastest kernels for tensors like these on this processor, or None."""
    names = KERNELS.get(dtype)
    return names[0] if names and head_dim % 16 == 0 and head_dim <= WIDEST_HEAD else None


def _shape(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, segments: Tensor, window: int, softcap: float, kernels: str
) -> _attention.Shape:
    """What the kernels are told of these tensors. Raises ValueError if they do not fit together: the kernels see
    addresses alone. (`Shape` itself refuses ends that do not rise from 0, and heads that do not divide.)"""
    if q_THE.ndim != 3 or k_TKE.ndim != 3 or q_THE.shape[::2] != k_TKE.shape[::2] or k_TKE.shape != v_TKE.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_THE, k_TKE, v_TKE))
        raise ValueError(f"q, k and v are {shapes}, not [T, H, E], [T, K, E] and [T, K, E]")
    if not q_THE.dtype == k_TKE.dtype == v_TKE.dtype or kernels not in KERNELS.get(q_THE.dtype, ()):
        raise ValueError(f"{kernels} does not take q, k and v of {q_THE.dtype}, {k_TKE.dtype} and {v_TKE.dtype}")
    if not (q_THE.is_cpu and k_TKE.is_cpu and v_TKE.is_cpu):
        raise ValueError(f"q, k and v are on {q_THE.device}, {k_TKE.device} and {v_TKE.device}, not on the CPU")
    T, H, E = q_THE.shape
    ends = segments.tolist()
    if ends and ends[-1] != T:
        raise ValueError(f"the segments end at {ends[-1]}, and there are {T} tokens")
    bounded = min(window or UNBOUNDED, UNBOUNDED)
    return _attention.Shape(ends, H, k_TKE.shape[1], E, bounded, softcap, torch.get_num_threads())


def _addresses(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]


@torch.library.custom_op("megalm::cpu_attention", mutates_args=())
def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, window: int, softcap: float, kernels: str
) -> tuple[Tensor, Tensor]:
    """out_THE of `attention` by these kernels, within `megalm.ops.softmax.limits`, and float32 [2, H, T] for the
    backward pass: each row's largest score (csrc/attention/attention.hpp), and the log2 of its sum of exponentials
    relative to that."""
    shape = _shape(q, k, v, segments, window, softcap, kernels)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out_THE = torch.empty_like(q)
    lse2_2HT = _lse2(q)
    _attention.forward(kernels, shape, _addresses(q, k, v, out_THE, lse2_2HT))
    return out_THE, lse2_2HT


def _lse2(q_THE: Tensor) -> Tensor:
    return q_THE.new_empty(2, q_THE.shape[1], q_THE.shape[0], dtype=torch.float32)


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
    shape = _shape(q, k, v, segments, window, softcap, kernels)
    for name, x in (("grad_out", grad_out), ("out", out)):
        if x.shape != q.shape or x.dtype != q.dtype or not x.is_cpu:
            raise ValueError(f"{name} is {tuple(x.shape)} of {x.dtype} on {x.device}, not what q is")
    if lse2.shape != (2, q.shape[1], q.shape[0]) or lse2.dtype != torch.float32 or not lse2.is_contiguous():
        raise ValueError(f"lse2 is {tuple(lse2.shape)} of {lse2.dtype}, not the [2, H, T] that cpu_attention gave")
    q, k, v, out, grad_out = (x.contiguous() for x in (q, k, v, out, grad_out))
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _attention.backward(kernels, shape, _addresses(q, k, v, out, lse2, grad_out, *grads))
    return grads


@cpu_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, window: int, softcap: float, kernels: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _lse2(q)


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
