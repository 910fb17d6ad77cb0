"""The native attention kernels, each that this processor has, against the dense definition in float64."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint, noop_context_fn

from megalm import _attention
from megalm.model.transformer import selective_contexts
from megalm.ops import attention as choice
from megalm.ops.attention import Segments, attention, attention_to_cache, reference_attention
from megalm.ops.cpu_attention import cpu_attention, kernels_for

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


def wanted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    ends: Tensor,
    window: int,
    softcap: float,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    segments = Segments.of(ends, torch.device("cpu"))
    out = reference_attention(*inputs, segments, window or None, softcap or None)
    return [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]


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


@pytest.mark.parametrize("spread", [1e2, 1e3, 1e4, 1e5])
def test_large_scores_cost_no_more_digits_than_in_dense_float32(spread: float) -> None:
    kernels = kernels_for(torch.float32, 64)
    if kernels is None:
        pytest.skip("no kernels of float32")
    x = (*tensors(300, 2, 1, 64, torch.float32, spread=spread), ends_of([300]))
    right = wanted(*x, 0, 0.0)
    errors = [
        [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True)]
        for found in (native(*x, 0, 0.0, kernels), wanted(*x, 0, 0.0, torch.float32))
    ]
    # A gradient of q and k is, where one score outweighs all others, a difference of equal numbers.
    compared = (0, 1, 2, 3) if spread <= 1e3 else (0, 3)
    for i in compared:
        assert errors[0][i] < 2 * errors[1][i] + 1e-6


def test_equal_scores_of_any_size_are_told_from_none() -> None:
    kernels = kernels_for(torch.float32, 16)
    if kernels is None:
        pytest.skip("no kernels of float32")
    for size in (1e5, 1e15, 1e30, -1e15, -1e30):
        q, k, v, grad = tensors(300, 1, 1, 16, torch.float32)
        q, k = torch.full_like(q, abs(size) ** 0.5), torch.full_like(k, math.copysign(abs(size) ** 0.5, size))
        out, _, _, grad_v = native(q, k, v, grad, ends_of([300]), 0, 0.0, kernels)
        mean = v.double().cumsum(0) / torch.arange(1, 301)[:, None, None]
        torch.testing.assert_close(out.double(), mean, rtol=1e-5, atol=1e-5)
        shares = grad.double() / torch.arange(1, 301)[:, None, None]
        torch.testing.assert_close(grad_v.double(), shares.flip(0).cumsum(0).flip(0), rtol=1e-5, atol=1e-5)


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
    largest, sum2 = lse2[:, 0].double()
    ours = largest / math.sqrt(32) + sum2 * math.log(2)
    torch.testing.assert_close(ours, natural, rtol=0, atol=TOLERANCE[dtype] / 3)


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


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"q": (50, 4)}, "not \\[T, H, E\\]"),
        ({"k": (30, 2, 32)}, "not \\[T, H, E\\]"),
        ({"k": (50, 2, 16)}, "not \\[T, H, E\\]"),
        ({"v": (50, 1, 32)}, "not \\[T, H, E\\]"),
        ({"q": (50, 3, 32)}, "multiple of kv_heads"),
        ({"v": torch.bfloat16}, "does not take"),
        ({"q": torch.float64, "k": torch.float64, "v": torch.float64}, "does not take"),
        ({"ends": [0, 20]}, "segments end at 20, and there are 50 tokens"),
        ({"ends": [0, 60]}, "segments end at 60, and there are 50 tokens"),
        ({"ends": [0, 60, 50]}, "ends must rise"),
        ({"ends": [5, 50]}, "ends must start with 0"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(wrong: dict[str, Any], reason: str) -> None:
    name, dtype = KERNELS[0]
    given = {"q": (50, 4, 32), "k": (50, 2, 32), "v": (50, 2, 32), "ends": [0, 20, 50]}
    tensors = []
    for key in ("q", "k", "v"):
        change = wrong.get(key)
        shape = change if isinstance(change, tuple) else given[key]
        tensors.append(torch.zeros(shape, dtype=change if isinstance(change, torch.dtype) else dtype))
    arguments = (torch.tensor(wrong.get("ends", given["ends"])), 0, 0.0, name)
    with pytest.raises(ValueError, match=reason):
        cpu_attention(*tensors, *arguments)


@each_kernel
def test_a_gradient_unlike_the_output_is_refused(kernels: str, dtype: torch.dtype) -> None:
    q, k, v, grad = tensors(20, 4, 2, 32, dtype)
    out, lse2 = torch.ops.megalm.cpu_attention(q, k, v, ends_of([20]), 0, 0.0, kernels)
    for wrong in (grad[:19], grad[:, :2], grad.double()):
        with pytest.raises(ValueError, match="grad_out is"):
            torch.ops.megalm.cpu_attention_backward(wrong, q, k, v, ends_of([20]), out, lse2, 0, 0.0, kernels)
    with pytest.raises(ValueError, match="lse2 is"):
        torch.ops.megalm.cpu_attention_backward(grad, q, k, v, ends_of([20]), out, lse2[0], 0, 0.0, kernels)


def test_windows_and_soft_caps_that_can_be_none_are_refused() -> None:
    q, k, v, _ = tensors(20, 4, 2, 32, torch.float32)
    segments = Segments.of(ends_of([20]), torch.device("cpu"))
    for function, arguments in ((attention, (q, k, v, segments)), (attention_to_cache, (q, k, v))):
        for window in (0, -1):
            with pytest.raises(ValueError, match=f"window={window} is no number of tokens"):
                function(*arguments, window=window)
        with pytest.raises(ValueError, match=r"softcap=-2\.0 bounds no score"):
            function(*arguments, softcap=-2.0)


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
def test_operands_of_many_segments_take_no_more_memory_than_their_bound() -> None:
    """A segment's operands are 10 MiB here, and 64 threads would prepare 65 of them."""
    program = """
import torch
from megalm.ops.cpu_attention import KERNELS, cpu_attention
torch.set_num_threads(64)
q, k, v = (torch.zeros(4096, heads, 16, requires_grad=True) for heads in (66 * 4, 66, 66))
out = cpu_attention(q, k, v, torch.tensor([0, 4096]), 1, 0.0, KERNELS[torch.float32][0])[0]
grad = torch.zeros_like(out)
def peak(name):
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(name)) / 1024
before = peak('VmRSS')
torch.autograd.grad(out, (q, k, v), grad)
print(peak('VmHWM') - before)
"""
    if kernels_for(torch.float32, 16) is None:
        pytest.skip("no kernels of float32")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280, check=True)
    gradients, slots, threads = 4096 * 66 * 6 * 16 * 4 / 2**20, 256, 64 * 0.4
    assert float(done.stdout) < gradients + slots + threads + 60


def test_unknown_kernels_and_missing_addresses_are_refused() -> None:
    shape = _attention.Shape([0, 5], 4, 2, 32, 5, 0.0, 1)
    with pytest.raises(ValueError, match="does not run the kernels nonsense"):
        _attention.forward("nonsense", shape, [0] * 5)
    with pytest.raises(ValueError, match="needs 9 addresses"):
        _attention.backward(KERNELS[0][0], shape, [0] * 5)
