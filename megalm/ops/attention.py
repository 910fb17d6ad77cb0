"""Causal attention inside segments (documents), on token-major tensors: no S×S mask, no padding.

The rows of a micro-batch are T tokens. `Segments` holds the cumulative ends `[0, ..., T]`; token t sees the tokens
s <= t of its own segment, at most `window` of them:

      segment 0   segment 1
    t ■
      ■ ■
      ■ ■ ■
            ■            each triangle is cut into blocks of query rows; what lies right of a
            ■ ■          block's diagonal, or left of its window, is never computed

Three ways to compute it, chosen in `attention`: torch's variable-length flash attention on a GPU in half precision,
the native kernels of `megalm.ops.cpu_attention` on a CPU that has the instructions, and `blocked_attention` everywhere
else. `reference_attention` is the definition that all are tested against.

Why not torch's flash attention on the CPU: it reaches a fraction of the matrix units' speed (17M Llama shape, bfloat16,
4,096 tokens: 27 ms forward and 76 ms with backward a layer, against 11 and 37 ms for batched matmuls over blocks).

In bfloat16 the blocks' scores are rounded to bfloat16 before the softmax, as in all unfused attention: the output is
off by 0.3% where scores are about 1 and by 1.7% where they are about 16 (flash attention keeps float32: 0.2%).

Shapes: T tokens, H query heads, K key/value heads, R = H / K query heads a key/value head, E head dim,
G segments of one length N processed together, I query rows of a block, J the keys that these see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from megalm.ops import native
from megalm.ops.cpu_attention import kernels_for
from megalm.ops.softmax import limits

BLOCK = 128  # query rows a block: small enough to skip most of the upper triangle, large enough for the matrix units
SCORES = 1 << 20  # scores of a block that are alive at once, where several segments go together: they stay in the cache


class Segments(NamedTuple):
    """Where documents end, in the forms that the two ways need; made once a micro-batch and used by every layer."""

    ends: Tensor
    """int32 on the CPU: cumulative ends `[0, ..., T]`."""
    device_ends: Tensor
    """The same where the model computes."""
    longest: int
    """Tokens of the longest segment."""

    @classmethod
    def of(cls, ends: Tensor, device: torch.device) -> Segments:
        ends = ends.cpu()
        return cls(ends, ends.to(device, non_blocking=True), int(ends.diff().max()))


def attention(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    segments: Segments,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of each token within its segment.

    `window`: how many tokens a token sees, itself included. `softcap`: scores become `cap * tanh(score / cap)`.
    Scores are scaled by `1 / sqrt(E)`. Returns o_THE.
    """
    limit = limits(window, softcap)
    if softcap is None and _flash_can(q_THE):
        return _flash_attention(q_THE, k_TKE, v_TKE, segments, window)
    kernels = kernels_for(q_THE.dtype, q_THE.shape[-1]) if q_THE.device.type == "cpu" else None
    if kernels is not None:
        return torch.ops.megalm.cpu_attention(q_THE, k_TKE, v_TKE, segments.ends, *limit, kernels)[0]
    return torch.ops.megalm.blocked_attention(q_THE, k_TKE, v_TKE, segments.ends, *limit)


def kernels_in_use(device: torch.device) -> str:
    """What `attention` computes with on this device, for heads of 64, such as `float32 avx512, bfloat16 amx`."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        q_THE = torch.empty(1, 1, 64, dtype=dtype, device=device)
        kernels = kernels_for(dtype, 64) if device.type == "cpu" else None
        name = "torch's flash attention" if _flash_can(q_THE) else kernels or "matrix products"
        found.append(f"{str(dtype).removeprefix('torch.')} {name}")
    return ", ".join(found)


def _flash_can(q_THE: Tensor) -> bool:
    """What torch's flash attention takes: half precision, an Ampere or newer GPU, head dims up to 256 by eights."""
    return (
        q_THE.is_cuda
        and q_THE.dtype in (torch.bfloat16, torch.float16)
        and q_THE.shape[-1] % 8 == 0
        and q_THE.shape[-1] <= 256
        and torch.cuda.get_device_capability(q_THE.device) >= (8, 0)
    )


def _flash_attention(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, segments: Segments, window: int | None) -> Tensor:
    ends, left = segments.device_ends, -1 if window is None else window - 1
    # Key/value heads are repeated by hand: torch 2.11 has no `enable_gqa` here.
    repeats = q_THE.shape[1] // k_TKE.shape[1]
    k_THE, v_THE = k_TKE.repeat_interleave(repeats, 1), v_TKE.repeat_interleave(repeats, 1)
    out_THE = varlen_attn(q_THE, k_THE, v_THE, ends, ends, segments.longest, segments.longest, window_size=(left, 0))
    assert isinstance(out_THE, Tensor), "it gives a tuple only if more is asked for"
    return out_THE


def reference_attention(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    segments: Segments,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition of `attention`, with a dense mask."""
    T, H, E = q_THE.shape
    repeats = H // k_TKE.shape[1]
    k_THE, v_THE = k_TKE.repeat_interleave(repeats, 1), v_TKE.repeat_interleave(repeats, 1)
    token_T = torch.arange(T, device=q_THE.device)
    segment_T = torch.bucketize(token_T, segments.device_ends[1:], right=True)
    distance_TT = token_T[:, None] - token_T[None, :]
    seen_TT = (segment_T[:, None] == segment_T[None, :]) & (distance_TT >= 0)
    if window is not None:
        seen_TT &= distance_TT < window
    scores_HTT = torch.einsum("the,she->hts", q_THE, k_THE) / math.sqrt(E)
    if softcap is not None:
        scores_HTT = softcap * torch.tanh(scores_HTT / softcap)
    return torch.einsum("hts,she->the", scores_HTT.masked_fill(~seen_TT, -math.inf).softmax(-1), v_THE)


def _equal_runs(ends: Tensor, heads: int) -> list[tuple[int, int, int]]:
    """(first token, segment length N, number of segments G) of each run of equally long neighbours."""
    runs: list[tuple[int, int, int]] = []
    for start, end in pairwise(ends.tolist()):
        first, length, count = runs[-1] if runs else (0, -1, 0)
        if length == end - start and (count + 1) * heads * length * min(length, BLOCK) <= SCORES:
            runs[-1] = (first, length, count + 1)
        elif end > start:
            runs.append((start, end - start, 1))
    return runs


def by_head(x_TKE: Tensor, count: int) -> Tensor:
    """[G·N, K, E] to [G·K, N, E], contiguous."""
    T, K, E = x_TKE.shape
    return x_TKE.view(count, T // count, K, E).transpose(1, 2).reshape(count * K, T // count, E)


def by_group(x_THE: Tensor, count: int, kv_heads: int) -> Tensor:
    """[G·N, K·R, E] to [G·K, R, N, E]: the query heads of one key/value head side by side."""
    T, H, E = x_THE.shape
    x = x_THE.view(count, T // count, kv_heads, H // kv_heads, E)
    return x.permute(0, 2, 3, 1, 4).reshape(count * kv_heads, H // kv_heads, T // count, E)


def by_token(x_BRNE: Tensor, count: int) -> Tensor:
    """[G·K, R, N, E] to [G, N, K·R, E]: undoes `by_group`."""
    B, R, N, E = x_BRNE.shape
    return x_BRNE.view(count, B // count, R, N, E).permute(0, 3, 1, 2, 4).reshape(count, N, B // count * R, E)


def blocks(rows: int, keys: int, window: int) -> list[tuple[slice, slice]]:
    """(query rows, keys that they see) of each block; the last row stands at the last key."""
    blocks = []
    for i in range(0, rows, BLOCK):
        j = min(i + BLOCK, rows)
        first_key = max(0, keys - rows + i - window + 1) if window else 0
        blocks.append((slice(i, j), slice(first_key, keys - rows + j)))
    return blocks


def _attend(q_BRIE: Tensor, k_BJE: Tensor, v_BJE: Tensor, window: int, softcap: float) -> Tensor:
    """Causal attention of the last I tokens of each of B sequences to its J keys."""
    B, R, I, E = q_BRIE.shape  # noqa: E741
    out_BRIE = torch.empty_like(q_BRIE)
    for rows, keys in blocks(I, k_BJE.shape[1], window):
        q_BXE = q_BRIE[:, :, rows].reshape(B, -1, E)
        p_BXJ, _ = _probabilities(q_BXE, k_BJE[:, keys], rows.stop - rows.start, window, softcap)
        out_BRIE[:, :, rows] = torch.bmm(p_BXJ, v_BJE[:, keys]).view(B, R, -1, E)
    return out_BRIE


def _probabilities(
    q_BXE: Tensor, k_BJE: Tensor, rows: int, window: int, softcap: float
) -> tuple[Tensor, Tensor | None]:
    """softmax(scores) of one block, B = G·K, X = R·I; and the soft-cap's derivative where there is one."""
    B, X, E = q_BXE.shape
    J = k_BJE.shape[1]
    scores = torch.bmm(q_BXE, k_BJE.transpose(1, 2)).mul_(1 / math.sqrt(E))
    slope = None
    if softcap:
        bent = torch.tanh(scores / softcap)
        scores, slope = bent * softcap, 1 - bent * bent
    # Row i of the block stands at key J - rows + i.
    distance_IJ = torch.arange(J - rows, J, device=scores.device)[:, None] - torch.arange(J, device=scores.device)
    hidden_IJ = distance_IJ < 0
    if window:
        hidden_IJ |= distance_IJ >= window
        scores.view(B, X // rows, rows, J).masked_fill_(hidden_IJ, -math.inf)
    else:
        scores.view(B, X // rows, rows, J)[..., J - rows :].masked_fill_(hidden_IJ[:, J - rows :], -math.inf)
    return torch.softmax(scores, -1), slope


def runs(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Iterator[tuple[slice, int, Tensor, Tensor, Tensor]]:
    """For each run of equally long segments: its tokens, their number G, and q_BRNE, k_BNE, v_BNE."""
    kv_heads = k.shape[1]
    for first, length, count in _equal_runs(ends, q.shape[1]):
        tokens = slice(first, first + length * count)
        yield (
            tokens,
            count,
            by_group(q[tokens], count, kv_heads),
            by_head(k[tokens], count),
            by_head(v[tokens], count),
        )


@torch.library.custom_op("megalm::blocked_attention", mutates_args=())
def blocked_attention(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, window: int, softcap: float) -> Tensor:
    """`attention` by batched matmuls over blocks of query rows, within `limits`."""
    out_THE = torch.empty_like(q)
    for tokens, count, q_BRNE, k_BNE, v_BNE in runs(q, k, v, segments):
        out_BRNE = _attend(q_BRNE, k_BNE, v_BNE, window, softcap)
        out_THE[tokens].view(count, -1, *q.shape[1:])[:] = by_token(out_BRNE, count)
    return out_THE


def attention_to_cache(
    q_IHE: Tensor, k_JKE: Tensor, v_JKE: Tensor, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """`attention` of the last I tokens of one document to all J of its keys, for generation. Returns o_IHE."""
    kv_heads = k_JKE.shape[1]
    q_BRIE, k_BJE, v_BJE = by_group(q_IHE, 1, kv_heads), by_head(k_JKE, 1), by_head(v_JKE, 1)
    return by_token(_attend(q_BRIE, k_BJE, v_BJE, *limits(window, softcap)), 1)[0]


@torch.library.custom_op("megalm::blocked_attention_backward", mutates_args=())
def blocked_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, window: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `blocked_attention`; the probabilities are computed again instead of kept."""
    grad_q_THE, grad_k_TKE, grad_v_TKE = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    kv_heads, scale = k.shape[1], 1 / math.sqrt(q.shape[2])
    for tokens, count, q_BRNE, k_BNE, v_BNE in runs(q, k, v, segments):
        go_BRNE = by_group(grad_out[tokens], count, kv_heads)
        B, R, N, E = q_BRNE.shape
        gq_BRNE = torch.empty_like(q_BRNE)
        # Several blocks add to one key's gradient: in float32, so that the sum is rounded once.
        gk_BNE, gv_BNE = torch.zeros(2, B, N, E, dtype=native.wide(q), device=q.device)
        for rows, keys in blocks(N, N, window):
            q_BXE, go_BXE = q_BRNE[:, :, rows].reshape(B, -1, E), go_BRNE[:, :, rows].reshape(B, -1, E)
            k_BJE, v_BJE = k_BNE[:, keys], v_BNE[:, keys]
            p_BXJ, slope_BXJ = _probabilities(q_BXE, k_BJE, rows.stop - rows.start, window, softcap)
            gv_BNE[:, keys] += torch.bmm(p_BXJ.transpose(1, 2), go_BXE)
            gp_BXJ = torch.bmm(go_BXE, v_BJE.transpose(1, 2))
            gs_BXJ = torch.ops.aten._softmax_backward_data(gp_BXJ, p_BXJ, -1, p_BXJ.dtype)
            if slope_BXJ is not None:
                gs_BXJ *= slope_BXJ
            gq_BRNE[:, :, rows] = torch.bmm(gs_BXJ, k_BJE).mul_(scale).view(B, R, -1, E)
            gk_BNE[:, keys] += torch.bmm(gs_BXJ.transpose(1, 2), q_BXE)
        grad_q_THE[tokens].view(count, N, kv_heads * R, E)[:] = by_token(gq_BRNE, count)
        grad_k_TKE[tokens].view(count, N, kv_heads, E)[:] = by_token(gk_BNE.mul_(scale)[:, None], count)
        grad_v_TKE[tokens].view(count, N, kv_heads, E)[:] = by_token(gv_BNE[:, None], count)
    return grad_q_THE, grad_k_TKE, grad_v_TKE


@blocked_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, window: int, softcap: float) -> Tensor:
    return torch.empty_like(q)


@blocked_attention_backward.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, window: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, segments, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, segments)


def _backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
    grads = torch.ops.megalm.blocked_attention_backward(
        grad_out.contiguous(), *ctx.saved_tensors, ctx.window, ctx.softcap
    )
    return *grads, None, None, None


blocked_attention.register_autograd(_backward, setup_context=_save)
