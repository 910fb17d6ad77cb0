"""The native attention kernels, each that this processor has, against the dense definition in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint, noop_context_fn

from megalm import _attention
from megalm.model.transformer import selective_contexts
from megalm.ops import attention as choice
from megalm.ops.attention import Segments, attention, reference_attention
from megalm.ops.cpu_attention import kernels_for

KERNELS = [(name, torch.float32) for name in _attention.kernels(bfloat16=False)]
KERNELS += [(name, torch.bfloat16) for name in _attention.kernels(bfloat16=True)]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}
CASES = {"plain": (0, 0.0), "window": (70, 0.0), "soft-cap": (0, 3.0), "both": (150, 5.0)}

pytestmark = pytest.mark.skipif(not KERNELS, reason="this processor has no instructions that the kernels use")
each_kernel = pytest.mark.parametrize(("kernels", "dtype"), KERNELS)


def ends_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def tensors(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, spread: float = 1
) -> list[Tensor]:
    """q, k, v and the output's gradient; scores' standard deviation is `spread`."""
    generator = torch.Generator().manual_seed(tokens + heads)
    shapes = [(tokens, count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    q, *others = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype) for x in (q * spread, *others)]


def native(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, ends: Tensor, *args: object) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, _ = torch.ops.megalm.cpu_attention(*inputs, ends, *args)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def wanted(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, ends: Tensor, window: int, softcap: float) -> list[Tensor]:
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    segments = Segments.of(ends, torch.device("cpu"))
    out = reference_attention(*inputs, segments, window or None, softcap or None)
    return [out, *torch.autograd.grad(out, inputs, grad.double())]


def assert_close(ours: list[Tensor], reference: list[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(ours, reference, strict=True):
        assert a.dtype == dtype
        assert a.isfinite().all()
        # A token that sees itself alone has no gradient in its scores, where only rounding is left.
        assert (a.double() - b).norm() <= TOLERANCE[dtype] * max(b.norm(), 0.3 * reference[0].norm())


@each_kernel
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 290) | st.sampled_from([1, 31, 32, 33, 127, 128, 129]), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    head_dim=st.sampled_from([16, 32, 64, 80]),
    window=st.just(0) | st.integers(1, 320),
    softcap=st.just(0.0) | st.floats(0.5, 20),
)
def test_it_equals_the_dense_definition(
    kernels: str,
    dtype: torch.dtype,
    lengths: list[int],
    heads: tuple[int, int],
    head_dim: int,
    window: int,
    softcap: float,
) -> None:
    x = (*tensors(sum(lengths), *heads, head_dim, dtype), ends_of(lengths))
    assert_close(native(*x, window, softcap, kernels), wanted(*x, window, softcap), dtype)


@each_kernel
@pytest.mark.parametrize("case", CASES)
def test_long_and_uneven_documents_and_scores_far_apart(kernels: str, dtype: torch.dtype, case: str) -> None:
    x = (*tensors(1500, 2, 1, 64, dtype, spread=8), ends_of([1, 1, 900, 2, 596]))
    assert_close(native(*x, *CASES[case], kernels), wanted(*x, *CASES[case]), dtype)


@pytest.mark.full
@each_kernel
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_every_head_dim(kernels: str, dtype: torch.dtype, head_dim: int, case: str) -> None:
    x = (*tensors(600, 4, 2, head_dim, dtype), ends_of([300, 45, 255]))
    assert_close(native(*x, *CASES[case], kernels), wanted(*x, *CASES[case]), dtype)


@pytest.mark.full
@each_kernel
@pytest.mark.parametrize("case", CASES)
def test_4096_tokens(kernels: str, dtype: torch.dtype, case: str) -> None:
    x = (*tensors(4096, 2, 1, 128, dtype), ends_of([4096]))
    assert_close(native(*x, *CASES[case], kernels), wanted(*x, *CASES[case]), dtype)


@each_kernel
def test_the_sum_of_exponentials_is_that_of_the_scores(kernels: str, dtype: torch.dtype) -> None:
    q, k, v, _ = tensors(50, 1, 1, 32, dtype)
    _, lse2 = torch.ops.megalm.cpu_attention(q, k, v, ends_of([50]), 0, 0.0, kernels)
    scores = q[:, 0].double() @ k[:, 0].double().T / math.sqrt(32)
    natural = scores.masked_fill(~torch.ones(50, 50).tril().bool(), -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse2[0].double() * math.log(2), natural, rtol=0, atol=TOLERANCE[dtype] / 3)


@each_kernel
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_threads_gives_the_same_bits(kernels: str, dtype: torch.dtype, case: str) -> None:
    x = (*tensors(1300, 4, 2, 48, dtype), ends_of([700, 1, 129, 470]))
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 2, 3):
            torch.set_num_threads(number)
            results.append(native(*x, *CASES[case], kernels))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@each_kernel
def test_a_document_is_the_same_bits_whatever_lies_beside_it(kernels: str, dtype: torch.dtype) -> None:
    q, k, v, grad = tensors(500, 2, 2, 32, dtype)
    together = native(q, k, v, grad, ends_of([100, 333, 67]), 0, 0.0, kernels)
    alone = native(*(x[100:433] for x in (q, k, v, grad)), ends_of([333]), 0, 0.0, kernels)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[100:433], b)


@each_kernel
def test_what_is_not_a_number_stays_in_its_document(kernels: str, dtype: torch.dtype) -> None:
    q, k, v, grad = tensors(200, 1, 1, 32, dtype)
    k[120] = torch.nan
    out, *gradients = native(q, k, v, grad, ends_of([100, 100]), 0, 0.0, kernels)
    assert out[120:].isnan().all()
    assert all(x[:100].isfinite().all() for x in (out, *gradients))
    assert out[100:120].isfinite().all()


@each_kernel
def test_tensors_need_not_be_contiguous(kernels: str, dtype: torch.dtype) -> None:
    x = tensors(100, 2, 2, 32, dtype)
    strided = [y.transpose(0, 1).contiguous().transpose(0, 1) for y in x]
    ends = ends_of([60, 40])
    for a, b in zip(native(*x, ends, 0, 0.0, kernels), native(*strided, ends, 0, 0.0, kernels), strict=True):
        assert torch.equal(a, b)


def used(function: object, *args: object) -> set[str]:
    """The operators of ours that the call runs."""
    assert callable(function)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args)
    return {event.key for event in profile.key_averages() if event.key.startswith("megalm::")}


@pytest.mark.parametrize(
    ("head_dim", "dtype", "operator"),
    [
        (64, torch.float32, "cpu_attention"),
        (256, torch.float32, "cpu_attention"),
        (24, torch.float32, "blocked_attention"),
        (272, torch.float32, "blocked_attention"),
        (64, torch.float64, "blocked_attention"),
        (64, torch.float16, "blocked_attention"),
    ],
)
def test_attention_takes_the_kernels_where_they_can_and_blocks_elsewhere(
    head_dim: int, dtype: torch.dtype, operator: str
) -> None:
    q, k, v, _ = tensors(20, 2, 1, head_dim, dtype)
    segments = Segments.of(ends_of([20]), torch.device("cpu"))
    assert used(attention, q, k, v, segments) == {f"megalm::{operator}"}
    out = attention(q, k, v, segments)
    torch.testing.assert_close(out, reference_attention(q, k, v, segments), rtol=2e-3, atol=2e-3)


def test_without_the_instructions_blocks_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "kernels_for", lambda dtype, head_dim: None)
    q, k, v, _ = tensors(20, 2, 1, 64, torch.float32)
    segments = Segments.of(ends_of([20]), torch.device("cpu"))
    assert used(attention, q, k, v, segments) == {"megalm::blocked_attention"}


@each_kernel
def test_the_operator_is_registered_soundly_for_compilation_and_autograd(kernels: str, dtype: torch.dtype) -> None:
    q, k, v, _ = (x.requires_grad_() for x in tensors(40, 4, 2, 32, dtype))
    torch.library.opcheck(torch.ops.megalm.cpu_attention.default, (q, k, v, ends_of([25, 15]), 0, 0.0, kernels))


@each_kernel
def test_a_compiled_call_gives_the_same_bits(kernels: str, dtype: torch.dtype) -> None:
    assert kernels_for(dtype, 32) is not None
    x = tensors(40, 4, 2, 32, dtype)
    segments = Segments.of(ends_of([25, 15]), torch.device("cpu"))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attention, compiled):
        inputs = [y.detach().requires_grad_() for y in x[:3]]
        out = function(*inputs, segments, 30, 2.0)
        results.append([out, *torch.autograd.grad(out, inputs, x[3])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_selective_recomputation_keeps_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x = [y.requires_grad_() for y in tensors(40, 4, 2, 32, torch.float32)[:3]]
    segments = Segments.of(ends_of([25, 15]), torch.device("cpu"))
    forward, calls = _attention.forward, []
    monkeypatch.setattr(_attention, "forward", lambda *args: (calls.append(1), forward(*args)))
    gradients = []
    for contexts in (selective_contexts, noop_context_fn):
        out = checkpoint(
            lambda q, k, v: attention(q * 1, k, v, segments).square(), *x, use_reentrant=False, context_fn=contexts
        )
        gradients.append(torch.autograd.grad(out.sum(), x))
        calls.append(0)
    assert calls == [1, 0, 1, 1, 0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"ends": []}, "ends must start with 0"),
        ({"ends": [0, 5, 3]}, "ends must rise"),
        ({"heads": 3}, "multiple of kv_heads"),
        ({"head_dim": 24}, "multiple of 16"),
        ({"head_dim": 512}, "at most 256"),
        ({"window": 0}, "window must be positive"),
    ],
)
def test_shapes_that_cannot_be_are_refused(wrong: dict[str, object], reason: str) -> None:
    sizes = {"ends": [0, 5], "heads": 4, "kv_heads": 2, "head_dim": 32, "window": 5, "softcap": 0.0, "threads": 1}
    with pytest.raises(ValueError, match=reason):
        _attention.Shape(**{**sizes, **wrong})


def test_unknown_kernels_and_missing_addresses_are_refused() -> None:
    shape = _attention.Shape([0, 5], 4, 2, 32, 5, 0.0, 1)
    with pytest.raises(ValueError, match="does not run the kernels nonsense"):
        _attention.forward("nonsense", shape, [0] * 5)
    with pytest.raises(ValueError, match="needs 9 addresses"):
        _attention.backward(KERNELS[0][0], shape, [0] * 5)
