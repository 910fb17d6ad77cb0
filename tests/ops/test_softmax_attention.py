from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalm.ops.attention import Segments, attention, reference_attention
from megalm.ops.softmax_attention import (
    softmax_attention,
    softmax_attention_to_cache,
    softmax_attention_with_statistics,
)

CASES = {"plain": (None, None), "window": (70, None), "soft-cap": (None, 3.0), "both": (150, 5.0)}


def segments_of(lengths: list[int]) -> Segments:
    ends = [0, *itertools.accumulate(lengths)]
    return Segments.of(torch.tensor(ends, dtype=torch.int32), torch.device("cpu"))


def tensors(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens + heads)
    shapes = [(tokens, heads, 16), (tokens, kv_heads, 16), (tokens, kv_heads, 16), (tokens, heads, 16), (heads,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def outputs_and_gradients(function, q, k, v, grad, *args, sinks: Tensor | None = None) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v, sinks) if x is not None]
    out = function(*inputs[:3], *args, *inputs[3:])
    return [out, *torch.autograd.grad(out, inputs, grad)]


def sinking_attention(q, k, v, segments, window, softcap, sinks) -> Tensor:
    """The definition, one token and head at a time."""
    out = []
    starts = torch.repeat_interleave(segments.ends[:-1], segments.ends.diff()).tolist()
    for t, start in enumerate(starts):
        first = start if window is None else max(start, t - window + 1)
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            s = k[first : t + 1, group] @ q[t, head] / math.sqrt(q.shape[2])
            s = s if softcap is None else softcap * torch.tanh(s / softcap)
            p = torch.cat((s, sinks[head : head + 1])).softmax(0)[:-1]
            out.append(p @ v[first : t + 1, group])
    return torch.stack(out).view(q.shape)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 280), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    window=st.none() | st.integers(1, 320),
    softcap=st.none() | st.floats(0.5, 20),
)
def test_both_attention_paths_are_equal(
    lengths: list[int], heads: tuple[int, int], window: int | None, softcap: float | None
) -> None:
    segments = segments_of(lengths)
    q, k, v, grad, _ = tensors(sum(lengths), *heads, torch.float64)
    ours = outputs_and_gradients(softmax_attention, q, k, v, grad, segments, window, softcap)
    for function, dtype, rtol, atol in (
        (reference_attention, torch.float64, 1e-10, 1e-12),
        (attention, torch.float64, 1e-10, 1e-12),
        (softmax_attention, torch.float32, 1e-4, 1e-5),
    ):
        inputs = (x.to(dtype) for x in (q, k, v, grad))
        for a, b in zip(outputs_and_gradients(function, *inputs, segments, window, softcap), ours, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_narrow_types_stay_close_to_float64(case: str, dtype: torch.dtype, tolerance: float) -> None:
    segments = segments_of([256, 256, 128, 1, 259])
    q, k, v, grad, _ = tensors(900, 4, 2, dtype)
    ours = outputs_and_gradients(softmax_attention, q, k, v, grad, segments, *CASES[case])
    wide = [x.double() for x in (q, k, v, grad)]
    wanted = outputs_and_gradients(reference_attention, *wide, segments, *CASES[case])
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() / b.norm() < tolerance


@pytest.mark.parametrize("case", ["plain", "both"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_sinks_take_their_share(case: str, dtype: torch.dtype, tolerance: float) -> None:
    segments = segments_of([40, 40, 150])
    q, k, v, grad, sinks = tensors(230, 4, 2, dtype)
    sinks = sinks.to(torch.promote_types(dtype, torch.float32))
    ours = outputs_and_gradients(softmax_attention, q, k, v, grad, segments, *CASES[case], sinks=sinks)
    wide = [x.double() for x in (q, k, v, grad)]
    wanted = outputs_and_gradients(sinking_attention, *wide, segments, *CASES[case], sinks=sinks.double())
    for a, b in zip(ours, wanted, strict=True):
        assert (a.double() - b).norm() / b.norm() < tolerance


def test_a_sink_of_minus_infinity_is_none() -> None:
    segments = segments_of([40, 90])
    q, k, v, _, _ = tensors(130, 4, 2, torch.float32)
    with_sinks = softmax_attention(q, k, v, segments, sinks_H=torch.full((4,), -torch.inf))
    torch.testing.assert_close(with_sinks, softmax_attention(q, k, v, segments))


def test_statistics_are_those_of_the_dense_scores() -> None:
    segments = segments_of([150, 150, 37])
    q, k, v, _, sinks = tensors(337, 4, 4, torch.float64)
    out, statistics = softmax_attention_with_statistics(q, k, v, segments, 90, None, sinks)
    torch.testing.assert_close(out, softmax_attention(q, k, v, segments, 90, None, sinks))
    token = torch.arange(337)
    document = torch.bucketize(token, segments.ends[1:], right=True)
    distance = token[:, None] - token
    seen = (document[:, None] == document) & (distance >= 0) & (distance < 90)
    scores = (torch.einsum("the,she->hts", q, k) / 4).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(statistics.largest, scores.amax((1, 2)))
    terms = torch.cat((scores, sinks[:, None, None].expand(4, 337, 1)), -1)
    entropy = torch.distributions.Categorical(logits=terms).probs
    torch.testing.assert_close(statistics.entropy, torch.special.entr(entropy).sum(-1).mean(-1))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("new", [1, 129])
def test_the_last_tokens_of_a_document_see_its_cached_keys(case: str, new: int) -> None:
    q, k, v, _, sinks = tensors(300, 4, 2, torch.float64)
    whole = softmax_attention(q, k, v, segments_of([300]), *CASES[case], sinks)
    last = softmax_attention_to_cache(q[-new:], k, v, *CASES[case], sinks)
    torch.testing.assert_close(last, whole[-new:], rtol=1e-10, atol=1e-12)


def test_sinks_may_be_of_a_narrow_type() -> None:
    q, k, v, grad, sinks = tensors(40, 4, 2, torch.bfloat16)
    narrow, wide = (
        outputs_and_gradients(softmax_attention, q, k, v, grad, segments_of([25, 15]), None, None, sinks=x)
        for x in (sinks, sinks.float())
    )
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(narrow, wide, strict=True))


def test_sinks_that_are_not_one_for_each_head_are_refused() -> None:
    q, k, v, _, sinks = tensors(40, 4, 2, torch.float32)
    for function in (softmax_attention, softmax_attention_with_statistics):
        with pytest.raises(ValueError, match="sinks_H is"):
            function(q, k, v, segments_of([25, 15]), sinks_H=sinks[:2])
        with pytest.raises(ValueError, match="window=-1"):
            function(q, k, v, segments_of([25, 15]), window=-1)
    with pytest.raises(ValueError, match="sinks_H is"):
        softmax_attention_to_cache(q, k, v, sinks_H=sinks[:1])
    with pytest.raises(ValueError, match="softcap=-1"):
        softmax_attention_to_cache(q, k, v, softcap=-1)


def test_a_score_that_is_no_number_shows_in_the_statistics() -> None:
    q, k, v, _, _ = tensors(40, 4, 2, torch.float32)
    q[7, 1] = torch.nan
    out, statistics = softmax_attention_with_statistics(q, k, v, segments_of([25, 15]))
    assert out[7, 1].isnan().all()
    for x in statistics:
        assert x.isnan().tolist() == [False, True, False, False]


def test_the_operator_is_registered_soundly_for_compilation_and_autograd() -> None:
    q, k, v, _, sinks = (x.requires_grad_() for x in tensors(40, 4, 2, torch.float64))
    ends = torch.tensor([0, 25, 40], dtype=torch.int32)
    for softcap, statistics in ((0.0, True), (3.0, False)):
        torch.library.opcheck(
            torch.ops.megalm.softmax_attention.default, (q, k, v, ends, sinks, 0, softcap, statistics)
        )
