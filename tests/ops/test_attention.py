from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalm.ops import attention as module
from megalm.ops.attention import Segments, attention, attention_to_cache, reference_attention

CASES = {"plain": (None, None), "window": (70, None), "soft-cap": (None, 3.0), "both": (150, 5.0)}


def segments_of(ends: list[int]) -> Segments:
    return Segments.of(torch.tensor(ends, dtype=torch.int32), torch.device("cpu"))


def tensors(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens + heads)
    shapes = [(tokens, heads, 16), (tokens, kv_heads, 16), (tokens, kv_heads, 16), (tokens, heads, 16)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def outputs_and_gradients(function, q, k, v, grad, *args) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*inputs, *args)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 280), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    window=st.none() | st.integers(1, 320),
    softcap=st.none() | st.floats(0.5, 20),
)
def test_it_equals_the_dense_definition_in_float64(
    lengths: list[int], heads: tuple[int, int], window: int | None, softcap: float | None
) -> None:
    segments = segments_of([0, *itertools.accumulate(lengths)])
    q, k, v, grad = tensors(sum(lengths), *heads, torch.float64)
    ours = outputs_and_gradients(attention, q, k, v, grad, segments, window, softcap)
    wanted = outputs_and_gradients(reference_attention, q, k, v, grad, segments, window, softcap)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
def test_narrow_types_stay_close_to_float64(case: str, dtype: torch.dtype, tolerance: float) -> None:
    segments = segments_of([0, 256, 512, 640, 641, 900])
    q, k, v, grad = tensors(900, 4, 2, dtype)
    window, softcap = CASES[case]
    blocked = torch.ops.megalm.blocked_attention  # which `attention` leaves to native kernels where there are any
    ours = outputs_and_gradients(blocked, q, k, v, grad, segments.ends, window or 0, softcap or 0.0)
    wide = [x.double() for x in (q, k, v, grad)]
    wanted = outputs_and_gradients(reference_attention, *wide, segments, *CASES[case])
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() / b.norm() < tolerance


def test_equal_segments_in_one_go_equal_them_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = segments_of(list(range(0, 601, 100)))
    q, k, v, grad = tensors(600, 4, 2, torch.float64)
    together = outputs_and_gradients(attention, q, k, v, grad, segments)
    monkeypatch.setattr(module, "SCORES", 0)
    alone = outputs_and_gradients(attention, q, k, v, grad, segments)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("new", [1, 5, 129, 300])
def test_the_last_tokens_of_a_document_see_its_cached_keys(case: str, new: int) -> None:
    q, k, v, _ = tensors(300, 4, 2, torch.float64)
    whole = reference_attention(q, k, v, segments_of([0, 300]), *CASES[case])
    torch.testing.assert_close(attention_to_cache(q[-new:], k, v, *CASES[case]), whole[-new:], rtol=1e-10, atol=1e-12)


def test_the_operator_is_registered_soundly_for_compilation_and_autograd() -> None:
    q, k, v, _ = tensors(40, 4, 2, torch.float64)
    segments = torch.tensor([0, 25, 40], dtype=torch.int32)
    arguments = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), segments, 0, 0.0)
    torch.library.opcheck(torch.ops.megalm.blocked_attention.default, arguments)
