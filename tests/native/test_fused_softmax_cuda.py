"""The CUDA kernels of csrc/fused_softmax against float64: the very sources, emulated on the CPU (cuda_emulation/), and
with `-m gpu` the built library on a GPU."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch
from cuda_kernels import SENTINEL, Expected, Guarded, empty, error_of, expected, visible
from hypothesis import strategies as st
from torch import Tensor

from megalm.ops import native
from megalm.ops.softmax import Settings, with_mask

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)
ASCENDING, DESCENDING, SHUFFLED = 0, 1, 2
SHARED = [hypothesis.HealthCheck.function_scoped_fixture]  # one library serves all examples


@pytest.fixture(autouse=True)
def device(kernels: tuple[ctypes.CDLL, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors are; whatever the host side calls for them is the library under test."""
    library, device = kernels
    monkeypatch.setattr(native, "library_for", lambda x: library)
    run_in_order(kernels, ASCENDING)
    return device


def run_in_order(kernels: tuple[ctypes.CDLL, str], order: int) -> None:
    """In which order lanes run between barriers, where they are emulated; hardware has its own."""
    library, device = kernels
    if device == "cpu":
        library.cuda_emulation_order(order)


def random(*shape: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


MASKS = ["all", "causal", "window", "documents", "padding", "allowed", "softcap", "sinks", "everything"]


def settings_of(mask: str, B: int, H: int, Q: int, K: int) -> Settings:
    """Settings in which only `mask` hides anything, or all do."""
    generator = torch.Generator().manual_seed(K)
    every = mask == "everything"
    chosen: dict[str, Any] = {"scale": 0.7}
    if mask in ("causal", "documents") or every:
        chosen["causal"] = True
    if mask == "window" or every:
        chosen["window"] = max(1, K // 3)
    if mask == "documents" or every:
        last = (torch.arange(Q) + max(K - Q, 0)).expand(B, Q)
        chosen["first_key"] = (last - torch.randint(0, K, (B, Q), generator=generator)).clamp(min=0).int()
    if mask == "padding" or every:
        chosen["padding"] = torch.rand(B, K, generator=generator) < 0.7
    if mask == "allowed" or every:
        chosen["allowed"] = (torch.rand(B, 1, Q, K, generator=generator) < 0.7).expand(B, H, Q, K)
    if mask == "softcap" or every:
        chosen["softcap"] = 2.5
    if mask == "sinks" or every:
        chosen["sinks"] = torch.linspace(-1, 2, H)
    return Settings(**chosen)


@dataclass
class Results:
    probabilities: Tensor
    lse: Tensor
    largest: Tensor
    entropy: Tensor
    grad_scores: Tensor
    grad_sink: Tensor


def run(device: str, scores: Tensor, grad: Tensor, settings: Settings, offsets: tuple[int, int] = (0, 0)) -> Results:
    """Both passes, results in their own memory, everything `offsets` elements (inputs, results) off alignment."""
    settings = Settings(*(x.to(device) if isinstance(x, Tensor) else x for x in settings))
    # Around the inputs lies what would spoil any result that reads it.
    scores, grad = (Guarded(x.to(device), offsets[0], math.nan).tensor for x in (scores, grad))
    rows = scores.new_full(scores.shape[:-1], SENTINEL, dtype=torch.float32)
    p, grad_scores = empty(scores, offsets[1]), empty(scores, offsets[1])
    lse, largest, entropy, grad_sink = (empty(rows, 1) for _ in range(4))
    forward = (scores, p.tensor, lse.tensor, largest.tensor, entropy.tensor)
    with_mask("megalm_softmax_forward", scores, settings, *forward)
    backward = (grad, p.tensor, scores, lse.tensor, grad_scores.tensor, grad_sink.tensor)
    with_mask("megalm_softmax_backward", scores, settings, *backward)
    for result in (p, grad_scores, lse, largest, entropy, grad_sink):
        assert result.is_whole(), "something was written beside a result"
    return Results(*(x.tensor.cpu() for x in (p, lse, largest, entropy, grad_scores, grad_sink)))


def assert_equal(results: Results, wanted: Expected, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    assert error_of(results.probabilities, wanted.probabilities) < tolerance
    # Half precision has gradients that are multiples of its smallest number.
    size = wanted.grad_size.abs() + torch.finfo(dtype).tiny
    assert error_of(results.grad_scores, wanted.grad_scores, size) < tolerance
    # Of float32 whatever the elements are; computed before the probabilities are rounded.
    assert error_of(results.lse, wanted.lse, wanted.lse.abs().clamp(min=1)) < 1e-6
    assert error_of(results.largest, wanted.largest) < 1e-6
    assert error_of(results.entropy, wanted.entropy, wanted.entropy.abs().clamp(min=1)) < 2e-6
    if wanted.grad_sink is not None:
        assert error_of(results.grad_sink, wanted.grad_sink, wanted.sink_size) < 2 * tolerance


def check(
    device: str, shape: tuple[int, int, int, int], dtype: torch.dtype, mask: str, offsets: tuple[int, int] = (0, 0)
) -> None:
    scores, grad = random(*shape, seed=1).to(dtype), random(*shape, seed=2).to(dtype)
    settings = settings_of(mask, *shape)
    results = run(device, scores, grad, settings, offsets)
    wanted = expected(scores, grad, settings)
    assert_equal(results, wanted, dtype)
    hidden = ~visible(scores.shape, settings)
    assert not results.probabilities[hidden].any()
    assert not results.grad_scores[hidden].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_template_is_reached_and_right(kernels: tuple[ctypes.CDLL, str], device: str, dtype: torch.dtype) -> None:
    pack = 4 if dtype == torch.float32 else 8
    seen = []
    for length in [*(32 * pack * packs for packs in (1, 2, 4, 8)), 32 * pack * 8 + 1]:
        check(device, (1, 1, 2, length), dtype, "causal")
        if device == "cpu":
            seen.append(kernels[0].cuda_emulation_last_kernel())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [130, 2100])
@pytest.mark.parametrize("mask", MASKS)
def test_each_mask_is_right_for_a_warps_and_a_blocks_rows(
    device: str, mask: str, keys: int, dtype: torch.dtype
) -> None:
    check(device, (2, 2, 3, keys) if keys < 2048 else (2, 1, 1, keys), dtype, mask)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 1, 5, 1), (1, 3, 7, 3), (2, 2, 9, 5), (1, 1, 33, 31), (1, 2, 2, 33)]
)
def test_short_rows_and_more_queries_than_keys(device: str, shape: tuple[int, int, int, int]) -> None:
    for mask in ("causal", "everything"):
        check(device, shape, torch.float32, mask)
        check(device, shape, torch.float16, mask)


@pytest.mark.parametrize("keys", [77, 255, 1023, 2041, 2049])
@pytest.mark.parametrize("offsets", [(0, 1), (1, 0), (3, 3), (2, 5)])
def test_any_alignment_of_inputs_and_results(
    kernels: tuple[ctypes.CDLL, str], device: str, offsets: tuple[int, int], keys: int
) -> None:
    run_in_order(kernels, DESCENDING)
    check(device, (1, 1, 3, keys), torch.bfloat16, "window", offsets)
    check(device, (1, 1, 2, keys), torch.float32, "causal", offsets)


@pytest.mark.parametrize("order", [DESCENDING, SHUFFLED, 3])
@pytest.mark.parametrize("keys", [300, 2500])
def test_results_do_not_depend_on_the_order_in_which_lanes_run(
    kernels: tuple[ctypes.CDLL, str], device: str, keys: int, order: int
) -> None:
    shape = (1, 2, 2, keys)
    scores, grad = random(*shape, seed=1), random(*shape, seed=2)
    results = []
    for chosen in (ASCENDING, order):
        run_in_order(kernels, chosen)
        results.append(run(device, scores, grad, settings_of("everything", *shape)))
    for name in Results.__dataclass_fields__:
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name


@pytest.mark.parametrize("keys", [100, 2300])
@pytest.mark.parametrize("offset", [0, 3])
def test_both_passes_may_write_over_their_input(
    kernels: tuple[ctypes.CDLL, str], device: str, keys: int, offset: int
) -> None:
    run_in_order(kernels, SHUFFLED)
    shape = (1, 2, 3, keys)
    scores, grad = random(*shape, seed=1).bfloat16().to(device), random(*shape, seed=2).bfloat16()
    settings = Settings(causal=True, window=keys // 2, scale=0.5)
    apart = run(device, scores, grad, settings)
    over = Guarded(scores, offset)
    with_mask("megalm_softmax_forward", scores, settings, over.tensor, over.tensor, None, None, None)
    assert torch.equal(over.tensor.cpu(), apart.probabilities)
    over_grad = Guarded(grad.to(device), offset)
    arguments = (over_grad.tensor, over.tensor, None, None, over_grad.tensor, None)
    with_mask("megalm_softmax_backward", scores, settings, *arguments)
    assert torch.equal(over_grad.tensor.cpu(), apart.grad_scores)
    assert over.is_whole()
    assert over_grad.is_whole()


@pytest.mark.parametrize("keys", [40, 2200])
def test_keys_outside_a_rows_range_are_not_read(device: str, keys: int) -> None:
    shape = (2, 1, 4, keys)
    settings = Settings(causal=True, window=keys // 2, first_key=torch.full((2, 4), keys // 4, dtype=torch.int32))
    scores, grad = random(*shape, seed=1), random(*shape, seed=2)
    clean = run(device, scores, grad, settings)
    hidden = ~visible(torch.Size(shape), settings)
    spoilt = run(device, scores.masked_fill(hidden, math.nan), grad.masked_fill(hidden, math.nan), settings)
    for name in ("probabilities", "lse", "largest", "entropy", "grad_scores"):
        assert torch.equal(getattr(clean, name), getattr(spoilt, name)), name


@pytest.mark.parametrize("keys", [6, 2200])
@pytest.mark.parametrize("sinks", [None, [-300.0, 2.0]])
def test_rows_with_nothing_to_see_are_zero_and_extremes_are_finite(
    device: str, keys: int, sinks: list[float] | None
) -> None:
    shape = (2, 2, 3, keys)
    scores, grad = random(*shape, seed=1), random(*shape, seed=2)
    scores[0, 0, 0] = -math.inf
    scores[0, 0, 1, ::2] = -math.inf
    scores[0, 1, 0] -= 3e4
    scores[0, 1, 1] += 3e4
    scores[0, 1, 2, -1] = 3e4
    padding = torch.ones(2, keys, dtype=torch.bool)
    padding[1] = False
    settings = Settings(padding=padding, sinks=None if sinks is None else torch.tensor(sinks))
    results, wanted = run(device, scores, grad, settings), expected(scores, grad, settings)
    is_large = scores.abs().amax(-1) > 1e4
    for result, want in (
        (results.probabilities, wanted.probabilities),
        (results.grad_scores, wanted.grad_scores),
        (results.lse, wanted.lse),
        (results.largest, wanted.largest),
        (results.entropy, wanted.entropy),
    ):
        assert error_of(result[~is_large], want[~is_large]) < 2e-6
        assert error_of(result[is_large], want[is_large]) < 2e-6
    assert not results.probabilities[1].any()
    assert not results.grad_scores[1].any()


def test_a_nan_is_not_hidden(device: str) -> None:
    for keys in (50, 2100):
        scores = random(1, 1, 3, keys, seed=1)
        scores[0, 0, 1, keys - 3] = math.nan
        results = run(device, scores, torch.ones_like(scores), Settings())
        for x in (results.probabilities, results.lse, results.largest, results.entropy):
            x = x.view(3, -1)
            assert x[1].isnan().all()
            assert not x[[0, 2]].isnan().any()


def test_no_rows_and_no_keys_are_no_error(device: str) -> None:
    nothing = torch.empty(0, device=device)
    with_mask("megalm_softmax_forward", torch.empty(1, 1, 0, 5, device=device), Settings(), *[nothing] * 5)
    lse, largest, entropy = (torch.full((1, 2, 3), SENTINEL, device=device) for _ in range(3))
    no_keys = torch.empty(1, 2, 3, 0, device=device)
    with_mask("megalm_softmax_forward", no_keys, Settings(), nothing, nothing, lse, largest, entropy)
    assert (lse == -math.inf).all()
    assert (largest == -math.inf).all()
    assert not entropy.any()


def test_what_no_kernel_takes_is_an_error(kernels: tuple[ctypes.CDLL, str]) -> None:
    library, _ = kernels
    mask = native.Mask(1, 1, 1, 1 << 31, scale=1)
    assert library.megalm_softmax_forward(ctypes.byref(mask), 0, None, None, None, None, None, 0) == -1
    assert library.megalm_softmax_forward(ctypes.byref(native.Mask(1, 1, 1, 8)), 3, *[None] * 5, 0) == -1
    assert library.megalm_cross_entropy_statistics(1, 1 << 31, 0, None, None, 0, *[None] * 4, 0) == -1
    assert library.megalm_cross_entropy_backward(1, 1 << 31, 0, *[None] * 4, 0, 0, 1, 0, None, 0) == -1
    too_many = native.Mask(1 << 12, 1 << 12, 1 << 12, 8, scale=1)
    assert library.megalm_softmax_forward(ctypes.byref(too_many), 0, None, None, None, None, None, 0) > 0


@hypothesis.settings(max_examples=60, suppress_health_check=SHARED, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_shape_mask_type_alignment_and_order(
    kernels: tuple[ctypes.CDLL, str], device: str, data: st.DataObject
) -> None:
    check_anything(kernels, device, data)


@pytest.mark.full
@hypothesis.settings(max_examples=1500, suppress_health_check=SHARED)
@hypothesis.given(data=st.data())
def test_many_shapes_masks_types_alignments_and_orders(
    kernels: tuple[ctypes.CDLL, str], device: str, data: st.DataObject
) -> None:
    check_anything(kernels, device, data)


def check_anything(kernels: tuple[ctypes.CDLL, str], device: str, data: st.DataObject) -> None:
    def draw(strategy: st.SearchStrategy[Any]) -> Any:
        return data.draw(strategy)

    keys = draw(st.integers(1, 300) | st.integers(1000, 2600))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 5 if keys < 1000 else 2)), keys)
    B, H, Q, K = shape
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    broadcast = [draw(st.sampled_from([1, n])) for n in (B, H, Q)]
    optional = {
        "first_key": torch.randint(0, K + 3, (B, Q), generator=generator).int(),
        "padding": torch.rand(B, K, generator=generator) < 0.5,
        "allowed": (torch.rand(*broadcast, K, generator=generator) < 0.5).expand(shape),
        "sinks": torch.randn(H, generator=generator),
        "window": draw(st.integers(1, K + 2)),
        "softcap": draw(st.floats(0.5, 20, width=32)),
        "causal": True,
    }
    wanted = draw(st.sets(st.sampled_from(sorted(optional))))
    chosen = Settings(
        scale=draw(st.just(-1.0) | st.floats(2**-7, 2, width=32)), **{name: optional[name] for name in wanted}
    )
    dtype = draw(st.sampled_from(DTYPES))
    scores, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    run_in_order(kernels, draw(st.integers(0, 5)))
    results = run(device, scores, grad, chosen, (draw(st.integers(0, 8)), draw(st.integers(0, 8))))
    assert_equal(results, expected(scores, grad, chosen), dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("keys", [1, 2, 7, 64, 127, 129, 257, 511, 513, 1025, 1999, 2047, 2048, 2056, 9001, 20000])
def test_lengths_masks_types_and_orders(
    kernels: tuple[ctypes.CDLL, str], device: str, keys: int, mask: str, dtype: torch.dtype
) -> None:
    for order, offsets in ((ASCENDING, (0, 0)), (DESCENDING, (1, 2)), (5, (3, 3))):
        run_in_order(kernels, order)
        check(device, (2, 2, 3, keys) if keys < 600 else (2, 1, 2, keys), dtype, mask, offsets)
