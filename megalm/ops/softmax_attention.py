"""Causal attention inside segments as two matrix products with our softmax between (`megalm.ops.softmax`).

It does what `megalm.ops.attention` does, and what the fused ways there cannot: attention sinks, on every device, and
statistics of the scores. Equal segments go together, cut into blocks of query rows, as there; a block's scores become
its probabilities in place, and in the backward pass, where they are computed again, the gradient of the one becomes
that of the other in place.

Shapes: T tokens, H query heads, K key/value heads, R = H / K, E head dim, G segments of one length N, B = G * K,
I query rows of a block, J the keys that these see.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalm.ops import native, softmax
from megalm.ops.attention import Segments, blocks, by_group, by_head, by_token, runs
from megalm.ops.softmax import Settings, Statistics, limits, sinks_of


def softmax_attention(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    segments: Segments,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """`attention` with a sink for each head. Returns o_THE."""
    options = (segments.ends, sinks_of(sinks_H, q_THE.shape[1], q_THE.device), *limits(window, softcap), False)
    return torch.ops.megalm.softmax_attention(q_THE, k_TKE, v_TKE, *options)[0]


def softmax_attention_with_statistics(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    segments: Segments,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Statistics]:
    """`softmax_attention`, and each head's largest score and mean entropy over the tokens, [H]: a score that grows, or
    an entropy that falls to 0, announces a loss that diverges (arXiv 2303.06296)."""
    options = (segments.ends, sinks_of(sinks_H, q_THE.shape[1], q_THE.device), *limits(window, softcap), True)
    out_THE, largest_TH, entropy_TH = torch.ops.megalm.softmax_attention(q_THE, k_TKE, v_TKE, *options)
    return out_THE, Statistics(largest_TH.detach().amax(0), entropy_TH.detach().mean(0))


def softmax_attention_to_cache(
    q_IHE: Tensor,
    k_JKE: Tensor,
    v_JKE: Tensor,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """`softmax_attention` of the last I tokens of one document to all J of its keys, for generation. Returns o_IHE."""
    kv_heads = k_JKE.shape[1]
    q_BRIE, k_BJE, v_BJE = by_group(q_IHE, 1, kv_heads), by_head(k_JKE, 1), by_head(v_JKE, 1)
    settings = _settings(q_IHE, sinks_of(sinks_H, q_IHE.shape[1], q_IHE.device), *limits(window, softcap))
    out_BRIE, _, _ = _attend(q_BRIE, k_BJE, v_BJE, 1, settings, False)
    return by_token(out_BRIE, 1)[0]


def _settings(q_THE: Tensor, sinks_H: Tensor | None, window: int, softcap: float) -> Settings:
    scale = 1 / math.sqrt(q_THE.shape[-1])
    return Settings(sinks=sinks_H, causal=True, window=window, scale=scale, softcap=softcap)


def _attend(
    q_BRIE: Tensor, k_BJE: Tensor, v_BJE: Tensor, count: int, settings: Settings, statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the last I tokens of each of G = `count` segments to its J keys; largest and entropy, [B, R, I]."""
    B, R, I, E = q_BRIE.shape  # noqa: E741
    out_BRIE = torch.empty_like(q_BRIE)
    wide = native.wide(q_BRIE)
    largest, entropy = q_BRIE.new_empty(2, *((B, R, I) if statistics else (0,)), dtype=wide)
    for rows, keys in blocks(I, k_BJE.shape[1], settings.window):
        scores_GHIJ = _scores(q_BRIE[:, :, rows], k_BJE[:, keys], count)
        p_GHIJ, _, *found = softmax.forward(scores_GHIJ, settings, statistics, in_place=True)
        p_BXJ = p_GHIJ.view(B, -1, p_GHIJ.shape[-1])
        out_BRIE[:, :, rows] = torch.bmm(p_BXJ, v_BJE[:, keys]).view(B, R, -1, E)
        if statistics:
            largest[:, :, rows], entropy[:, :, rows] = (x.view(B, R, -1) for x in found)
    return out_BRIE, largest, entropy


def _scores(q_BRIE: Tensor, k_BJE: Tensor, count: int) -> Tensor:
    """q k^T as [G, H, I, J], the shape in which the softmax counts its heads."""
    B, R, I, E = q_BRIE.shape  # noqa: E741
    scores_BXJ = torch.bmm(q_BRIE.reshape(B, R * I, E), k_BJE.transpose(1, 2))
    return scores_BXJ.view(count, B // count * R, I, -1)


@torch.library.custom_op("megalm::softmax_attention", mutates_args=())
def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, sinks: Tensor | None, window: int, softcap: float, statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    settings = _settings(q, sinks, window, softcap)
    out_THE = torch.empty_like(q, memory_format=torch.contiguous_format)
    largest_TH, entropy_TH = _statistics(q, statistics)
    for tokens, count, q_BRNE, k_BNE, v_BNE in runs(q, k, v, ends):
        out_BRNE, *found = _attend(q_BRNE, k_BNE, v_BNE, count, settings, statistics)
        out_THE[tokens].view(count, -1, *q.shape[1:])[:] = by_token(out_BRNE, count)
        if statistics:
            for whole_TH, x_BRN in zip((largest_TH, entropy_TH), found, strict=True):
                whole_TH[tokens].view(count, -1, q.shape[1])[:] = by_token(x_BRN[..., None], count)[..., 0]
    return out_THE, largest_TH, entropy_TH


def _statistics(q: Tensor, statistics: bool) -> tuple[Tensor, Tensor]:
    shape = q.shape[:2] if statistics else (0,)
    wide = native.wide(q)
    return q.new_empty(shape, dtype=wide), q.new_empty(shape, dtype=wide)


@torch.library.custom_op("megalm::softmax_attention_backward", mutates_args=())
def _softmax_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    sinks: Tensor | None,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = _settings(q, sinks, window, softcap)
    wide = native.wide(q)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    grad_sinks_H = q.new_zeros(0 if sinks is None else len(sinks), dtype=wide)
    kv_heads = k.shape[1]
    for tokens, count, q_BRNE, k_BNE, v_BNE in runs(q, k, v, ends):
        go_BRNE = by_group(grad_out[tokens], count, kv_heads)
        B, R, N, E = q_BRNE.shape
        gq_BRNE = torch.empty_like(q_BRNE)
        # Several blocks add to one key's gradient: in float32, so that the sum is rounded once.
        gk_BNE, gv_BNE = torch.zeros(2, B, N, E, dtype=wide, device=q.device)
        for rows, keys in blocks(N, N, window):
            q_BXE, go_BXE = q_BRNE[:, :, rows].reshape(B, -1, E), go_BRNE[:, :, rows].reshape(B, -1, E)
            k_BJE, v_BJE = k_BNE[:, keys], v_BNE[:, keys]
            scores_GHIJ = _scores(q_BRNE[:, :, rows], k_BJE, count)
            # Only a soft-cap's derivative asks for the scores again.
            p_GHIJ, lse, _, _ = softmax.forward(scores_GHIJ, settings, in_place=not softcap)
            p_BXJ = p_GHIJ.view(B, -1, p_GHIJ.shape[-1])
            gv_BNE[:, keys] += torch.bmm(p_BXJ.transpose(1, 2), go_BXE)
            gp_GHIJ = torch.bmm(go_BXE, v_BJE.transpose(1, 2)).view(p_GHIJ.shape)
            gs_GHIJ, grad_sink = softmax.backward(gp_GHIJ, p_GHIJ, scores_GHIJ, lse, settings, in_place=True)
            if sinks is not None:
                grad_sinks_H += grad_sink.sum((0, 2))
            gs_BXJ = gs_GHIJ.view(p_BXJ.shape)
            gq_BRNE[:, :, rows] = torch.bmm(gs_BXJ, k_BJE).view(B, R, -1, E)
            gk_BNE[:, keys] += torch.bmm(gs_BXJ.transpose(1, 2), q_BXE)
        for whole, x_BRNE in zip(grads, (gq_BRNE, gk_BNE[:, None], gv_BNE[:, None]), strict=True):
            whole[tokens].view(count, N, *whole.shape[1:])[:] = by_token(x_BRNE, count)
    grad_q_THE, grad_k_TKE, grad_v_TKE = grads
    return grad_q_THE, grad_k_TKE, grad_v_TKE, grad_sinks_H


@_softmax_attention.register_fake
def _(q, k, v, ends, sinks, window, softcap, statistics):  # type: ignore[no-untyped-def]
    return torch.empty_like(q, memory_format=torch.contiguous_format), *_statistics(q, statistics)


@_softmax_attention_backward.register_fake
def _(grad_out, q, k, v, ends, sinks, window, softcap):  # type: ignore[no-untyped-def]
    wide = native.wide(q)
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return *grads, q.new_empty(0 if sinks is None else sinks.shape[0], dtype=wide)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, ends, sinks, ctx.window, ctx.softcap, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, ends, sinks)


def _backward(ctx, grad_out: Tensor, *_):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: with recomputation they are gone then
    *grads, grad_sinks_H = torch.ops.megalm.softmax_attention_backward(
        grad_out.contiguous(), *saved, ctx.window, ctx.softcap
    )
    sinks = saved[-1]
    return *grads, None, None if sinks is None else grad_sinks_H.to(sinks.dtype), None, None, None


_softmax_attention.register_autograd(_backward, setup_context=_save)
