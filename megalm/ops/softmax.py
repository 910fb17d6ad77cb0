"""Scaled, soft-capped, masked softmax over attention scores, with sinks: one pass each way, by the native kernels.

    s = scale * score, or softcap * tanh(scale * score / softcap)
    p[k] = exp(s[k]) / (exp(sink) + sum over visible j of exp(s[j])), 0 where k is hidden

What a query cannot see by arithmetic (causal order, window, the start of its document) is neither read nor computed; a
row that sees nothing gives zeros. A sink (arXiv 2309.17453, in the form of gpt-oss, arXiv 2508.10925) is a logit a head
that takes its share and attends to nothing. `reference_softmax` is the definition; it also computes where no native
kernel does (`megalm.ops.native`). A sink is finite, or minus infinity, which is none.

Shapes: B batch, H heads, Q queries, K keys.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megalm.ops import native


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees: those that no setting hides. The last query stands at the last key."""

    causal: bool = False
    """No key after the query's own."""
    window: int | None = None
    """At most this many keys back, the query's own included."""
    first_key_BQ: Tensor | None = None
    """int32: no key before this; see `first_keys`."""
    padding_BK: Tensor | None = None
    """bool: which keys there are."""
    allowed: Tensor | None = None
    """bool [B or 1, H or 1, Q or 1, K]: any other mask."""


class Statistics(NamedTuple):
    """What the attention of each row is like, float32 [B, H, Q]."""

    largest: Tensor
    """The largest visible s, -inf if nothing is."""
    entropy: Tensor
    """In nats, the sink's share included."""


def first_keys(ends: Tensor, batch: int) -> Tensor:
    """First key, int32 [B, Q], of each query's document in `batch` rows of a micro-batch whose documents end at `ends`
    (cumulative, `[0, ..., B * Q]`); one that began in an earlier row begins with the row."""
    starts = ends[:-1].repeat_interleave(ends.diff()).view(batch, -1)
    rows = torch.arange(batch, device=ends.device)[:, None] * starts.shape[1]
    return (starts - rows).clamp(min=0).to(torch.int32)


def limits(window: int | None, softcap: float | None) -> tuple[int, float]:
    """Both as the operators of `megalm::` take them, to which 0 is none. Raises ValueError for what neither can be."""
    if window is not None and window < 1:
        raise ValueError(f"window={window} is no number of tokens, of which each sees itself: give 1 or more, or None")
    if softcap is not None and not 0 <= softcap < math.inf:
        raise ValueError(f"softcap={softcap} bounds no score: give a number above 0, or None")
    return window or 0, softcap or 0.0


def sinks_of(sinks_H: Tensor | None, heads: int, device: torch.device) -> Tensor | None:
    """The same sinks. Raises ValueError if they are not one for each head, where the scores are."""
    if sinks_H is not None:
        _refuse_unlike("sinks_H", sinks_H, (heads,), (torch.float32, torch.float64, *native.DTYPES), device)
    return sinks_H


def _refuse_unlike(
    name: str, x: Tensor, shape: tuple[int, ...] | None, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if x.dtype not in dtypes or shape not in (None, x.shape) or x.device != device:
        wanted = f"{dtypes[0]} on {device}" if shape is None else f"{shape} of {dtypes[0]} on {device}"
        raise ValueError(f"{name} is {tuple(x.shape)} of {x.dtype} on {x.device}, not {wanted}")


class Settings(NamedTuple):
    """All that the kernels are told besides the scores, as the operators take it."""

    first_key: Tensor | None = None
    padding: Tensor | None = None
    allowed: Tensor | None = None
    sinks: Tensor | None = None
    causal: bool = False
    window: int = 0
    scale: float = 1.0
    softcap: float = 0.0

    @classmethod
    def of(
        cls, scores: Tensor, visible: Visibility, scale: float, softcap: float | None, sinks_H: Tensor | None
    ) -> Settings:
        B, H, Q, K = scores.shape
        first_key, padding, allowed = visible.first_key_BQ, visible.padding_BK, visible.allowed
        for name, tensor, shape, dtype in (
            ("first_key_BQ", first_key, (B, Q), torch.int32),
            ("padding_BK", padding, (B, K), torch.bool),
            ("allowed", allowed, None, torch.bool),
        ):
            if tensor is not None:
                _refuse_unlike(name, tensor, shape, (dtype,), scores.device)
        sinks = sinks_of(sinks_H, H, scores.device)
        if allowed is not None:
            allowed = allowed.expand(*allowed.shape[:-1], K).expand(B, H, Q, K)
        window, softcap = limits(visible.window, softcap)
        return cls(first_key, padding, allowed, sinks, visible.causal, window, scale, softcap)


def fused_softmax(
    scores_BHQK: Tensor,
    visible: Visibility = Visibility(),
    scale: float = 1.0,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    overwrites_gradient: bool = False,
) -> Tensor:
    """Probabilities in the type of the scores; all arithmetic is in float32 (or the scores' type, if wider).

    `overwrites_gradient`: the backward pass writes the scores' gradient over that of the probabilities, which saves its
    memory; only where nothing else reads that gradient, as where a matrix product made it.
    """
    settings = Settings.of(scores_BHQK, visible, scale, softcap, sinks_H)
    return torch.ops.megalm.fused_softmax(scores_BHQK, *settings, False, overwrites_gradient)[0]


def softmax_with_statistics(
    scores_BHQK: Tensor,
    visible: Visibility = Visibility(),
    scale: float = 1.0,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Statistics]:
    """`fused_softmax`, and what it is like, which has no gradient."""
    settings = Settings.of(scores_BHQK, visible, scale, softcap, sinks_H)
    probabilities, _, largest, entropy = torch.ops.megalm.fused_softmax(scores_BHQK, *settings, True, False)
    return probabilities, Statistics(largest.detach(), entropy.detach())


def reference_softmax(
    scores_BHQK: Tensor,
    visible: Visibility = Visibility(),
    scale: float = 1.0,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Statistics]:
    """The definition of `softmax_with_statistics`, by torch."""
    settings = Settings.of(scores_BHQK, visible, scale, softcap, sinks_H)
    probabilities, _, largest, entropy = _reference_forward(scores_BHQK, settings)
    return probabilities, Statistics(largest, entropy)


def forward(
    scores: Tensor, settings: Settings, statistics: bool = False, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities, over contiguous `scores` if `in_place`; log-normaliser, where there are sinks or statistics; and
    the two statistics; what is not wanted is empty."""
    if native.library_for(scores) is None:
        probabilities, *rows = _reference_forward(scores, settings)
        wanted = _wanted(settings, statistics)
        lse, largest, entropy = (x if want else x.new_empty(0) for x, want in zip(rows, wanted, strict=True))
        return scores.copy_(probabilities) if in_place else probabilities, lse, largest, entropy
    lse, largest, entropy = _row_results(scores, settings, statistics)
    scores = scores.contiguous()
    probabilities = scores if in_place else torch.empty_like(scores)
    if scores.shape[:-1].numel():
        with_mask("megalm_softmax_forward", scores, settings, scores, probabilities, lse, largest, entropy)
    return probabilities, lse, largest, entropy


def backward(
    grad: Tensor, probabilities: Tensor, scores: Tensor, lse: Tensor, settings: Settings, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores, over contiguous `grad` if `in_place`, and of the sinks in each row (empty without).
    `scores` are read with a soft-cap only, `lse` with sinks only."""
    if native.library_for(grad) is None:
        grad_scores, grad_sink = _reference_backward(grad, probabilities, scores, lse, settings)
        return grad.copy_(grad_scores) if in_place else grad_scores, grad_sink
    grad, probabilities = grad.contiguous(), probabilities.contiguous()
    capped = scores.contiguous() if settings.softcap else None
    grad_scores = grad if in_place else torch.empty_like(grad)
    grad_sink = lse.new_empty(0) if settings.sinks is None else torch.empty_like(lse)
    if grad.shape[:-1].numel():
        arguments = (grad, probabilities, capped, lse, grad_scores, grad_sink)
        with_mask("megalm_softmax_backward", grad, settings, *arguments)
    return grad_scores, grad_sink


def _row_results(scores: Tensor, settings: Settings, statistics: bool) -> list[Tensor]:
    """Empty lse, largest and entropy: with a place for each row, or with none."""
    wanted = _wanted(settings, statistics)
    return [scores.new_empty(scores.shape[:-1] if want else (0,), dtype=native.wide(scores)) for want in wanted]


def _wanted(settings: Settings, statistics: bool) -> tuple[bool, bool, bool]:
    """Whether lse, largest and entropy are asked for."""
    return statistics or settings.sinks is not None, statistics, statistics


def with_mask(name: str, scores: Tensor, settings: Settings, *tensors: Tensor | None) -> None:
    """Calls a kernel of csrc/fused_softmax/softmax.h; an empty tensor is a null pointer, as torch has it."""
    first_key, padding, allowed, sinks, causal, window, scale, softcap = settings
    first_key, padding, sinks = (None if x is None else x.contiguous() for x in (first_key, padding, sinks))
    if sinks is not None:
        sinks = sinks.float()
    if allowed is not None and allowed.shape[-1] > 1 and allowed.stride(-1) != 1:
        allowed = allowed.contiguous()
    pointers = (None if x is None else x.data_ptr() for x in (first_key, padding, allowed))
    strides = (0, 0, 0) if allowed is None else allowed.stride()[:3]
    sink_pointer = None if sinks is None else sinks.data_ptr()
    mask = native.Mask(*scores.shape, *pointers, *strides, sink_pointer, window, causal, scale, softcap)
    native.call(name, scores, ctypes.byref(mask), native.DTYPES[scores.dtype], *tensors)


def _reference_forward(scores: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, Q, K = scores.shape
    query = torch.arange(Q, device=scores.device)[:, None] + (K - Q)
    key = torch.arange(K, device=scores.device)
    seen = torch.ones(1, 1, Q, K, dtype=torch.bool, device=scores.device)
    if settings.causal:
        seen = seen & (key <= query)
    if settings.window:
        seen = seen & (key > query - settings.window)
    if settings.first_key is not None:
        seen = seen & (key >= settings.first_key[:, None, :, None])
    if settings.padding is not None:
        seen = seen & settings.padding[:, None, None, :]
    if settings.allowed is not None:
        seen = seen & settings.allowed
    s = scores.to(native.wide(scores)) * settings.scale
    if settings.softcap:
        s = settings.softcap * torch.tanh(s / settings.softcap)
    s = s.masked_fill(~seen, -math.inf)
    terms = s
    if settings.sinks is not None:
        terms = torch.cat((s, settings.sinks.to(s.dtype)[:, None, None].expand(B, H, Q, 1)), -1)
    lse = terms.logsumexp(-1)
    # Where there is no term at all, -inf - -inf would be NaN.
    p_terms = (terms - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    entropy = torch.special.entr(p_terms).sum(-1)
    largest = s.amax(-1) if K else s.new_full((B, H, Q), -math.inf)
    return p_terms[..., :K].contiguous().to(scores.dtype), lse, largest, entropy


def _reference_backward(
    grad: Tensor, probabilities: Tensor, scores: Tensor, lse: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    p, g = probabilities.to(native.wide(grad)), grad.to(native.wide(grad))
    dot = (p * g).sum(-1, keepdim=True)
    grad_scores = settings.scale * p * (g - dot)
    if settings.softcap:
        grad_scores *= 1 - torch.tanh(scores.to(g.dtype) * (settings.scale / settings.softcap)) ** 2
    if settings.sinks is None:
        return grad_scores.to(grad.dtype), g.new_empty(0)
    share = (settings.sinks.to(g.dtype)[:, None] - lse).exp()
    return grad_scores.to(grad.dtype), (-share * dot[..., 0]).masked_fill(lse == -math.inf, 0)


@torch.library.custom_op("megalm::fused_softmax", mutates_args=())
def _fused_softmax(
    scores: Tensor,
    first_key: Tensor | None,
    padding: Tensor | None,
    allowed: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    statistics: bool,
    overwrites_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = Settings(first_key, padding, allowed, sinks, causal, window, scale, softcap)
    return forward(scores, settings, statistics)


@_fused_softmax.register_fake
def _(scores, first_key, padding, allowed, sinks, causal, window, scale, softcap, statistics, overwrites_gradient):  # type: ignore[no-untyped-def]
    settings = Settings(sinks=sinks)
    probabilities = torch.empty_like(scores, memory_format=torch.contiguous_format)
    return probabilities, *_row_results(scores, settings, statistics)


@torch.library.custom_op("megalm::fused_softmax_backward", mutates_args=())
def _fused_softmax_backward(
    grad: Tensor,
    probabilities: Tensor,
    scores: Tensor,
    lse: Tensor,
    first_key: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    settings = Settings(first_key, None, None, sinks, causal, window, scale, softcap)
    return backward(grad, probabilities, scores, lse, settings)


@_fused_softmax_backward.register_fake
def _(grad, probabilities, scores, lse, first_key, sinks, causal, window, scale, softcap):  # type: ignore[no-untyped-def]
    grad_scores = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return grad_scores, lse.new_empty(0) if sinks is None else torch.empty_like(lse)


@torch.library.custom_op("megalm::fused_softmax_backward_", mutates_args=("grad",))
def _fused_softmax_backward_(
    grad: Tensor,
    probabilities: Tensor,
    scores: Tensor,
    lse: Tensor,
    first_key: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    settings = Settings(first_key, None, None, sinks, causal, window, scale, softcap)
    return backward(grad, probabilities, scores, lse, settings, in_place=True)[1]


@_fused_softmax_backward_.register_fake
def _(grad, probabilities, scores, lse, first_key, sinks, causal, window, scale, softcap):  # type: ignore[no-untyped-def]
    return lse.new_empty(0) if sinks is None else torch.empty_like(lse)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    scores, first_key, _, _, sinks, *ctx.numbers, _, ctx.overwrites_gradient = inputs
    probabilities, lse, largest, entropy = output
    ctx.mark_non_differentiable(lse, largest, entropy)
    softcap = ctx.numbers[-1]
    ctx.save_for_backward(probabilities, scores if softcap else scores.new_empty(0), lse, first_key, sinks)


def _backward(ctx, grad: Tensor, *_):  # type: ignore[no-untyped-def]
    *saved, sinks = ctx.saved_tensors
    # What is to be differentiated once more has to be there still.
    if ctx.overwrites_gradient and grad.is_contiguous() and not torch.is_grad_enabled():
        grad_sink = torch.ops.megalm.fused_softmax_backward_(grad, *saved, sinks, *ctx.numbers)
    else:
        grad, grad_sink = torch.ops.megalm.fused_softmax_backward(grad, *saved, sinks, *ctx.numbers)
    grad_sinks_H = None if sinks is None else grad_sink.sum((0, 2)).to(sinks.dtype)
    return grad, None, None, None, grad_sinks_H, *[None] * 6


_fused_softmax.register_autograd(_backward, setup_context=_save)
