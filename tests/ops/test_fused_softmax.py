from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalm.ops import native
from megalm.ops.softmax import Visibility, first_keys, fused_softmax, reference_softmax, softmax_with_statistics

TYPES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LENGTHS = st.integers(1, 200) | st.sampled_from([16, 17, 64, 255, 2047, 2048, 2049])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mostly(share: float, *shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@st.composite
def visibilities(draw: st.DrawFn, B: int, H: int, Q: int, K: int) -> Visibility:
    first_key = padding = allowed = None
    seed = draw(st.integers(0, 99))
    if draw(st.booleans()):
        first_key = torch.randint(K + 3, (B, Q), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    if draw(st.booleans()):
        padding = mostly(draw(st.sampled_from([0.0, 0.5, 0.9])), B, K, seed=seed)
    if draw(st.booleans()):
        shape = [draw(st.sampled_from(sizes)) for sizes in ((1, B), (1, H), (1, Q))]
        allowed = mostly(0.6, *shape, K, seed=seed + 1)
        if draw(st.booleans()):  # the same bytes with other strides
            allowed = allowed.transpose(2, 3).contiguous().transpose(2, 3)
    window = draw(st.none() | st.integers(1, K + 2))
    return Visibility(draw(st.booleans()), window, first_key, padding, allowed)


@st.composite
def cases(
    draw: st.DrawFn, lengths: st.SearchStrategy[int] = LENGTHS
) -> tuple[Tensor, Visibility, float | None, Tensor | None]:
    B, H, Q, K = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(lengths)
    scores = 4 * noise(B, H, Q, K, seed=K)
    if draw(st.booleans()):  # rows that are not neighbours in memory
        scores = scores.transpose(0, 2).contiguous().transpose(0, 2)
    sinks = noise(H, seed=1) if draw(st.booleans()) else None
    return scores, draw(visibilities(B, H, Q, K)), draw(st.none() | st.sampled_from([2.0, 30.0])), sinks


def results(function, scores: Tensor, visible: Visibility, softcap, sinks, **options) -> list[Tensor]:
    """Probabilities, statistics if the function gives them, and the gradients of the scores and the sinks."""
    inputs = [x.detach().clone().requires_grad_() for x in (scores, sinks) if x is not None]
    out = function(inputs[0], visible, 0.7, softcap, *inputs[1:], **options)
    p, statistics = out if isinstance(out, tuple) else (out, ())
    grad = noise(*scores.shape, seed=7).to(scores.dtype)
    return [p, *statistics, *torch.autograd.grad(p, inputs, grad)]


def distance(ours: Tensor, wanted: Tensor, size: float = 1e-2) -> float:
    """Of all elements together, relative to them or to `size`; where it is minus infinity, both have to be."""
    assert torch.equal(ours == -torch.inf, wanted == -torch.inf)
    ours, wanted = (x.double().masked_fill(x == -torch.inf, 0) for x in (ours, wanted))
    return (ours - wanted).norm().item() / max(wanted.norm().item(), size)


@settings(max_examples=150, deadline=None)
@given(case=cases(), dtype=st.sampled_from(list(TYPES)))
@example((noise(1, 1, 1, 20_003), Visibility(), None, None), torch.float32)
@example((noise(2, 1, 3, 5), Visibility(allowed=mostly(0, 1, 1, 1, 5, seed=0)), 3.0, None), torch.float32)
@example((noise(1, 2, 9, 4), Visibility(causal=True), None, noise(2)), torch.bfloat16)
@example((4 * noise(1, 1, 1, 10, seed=10), Visibility(causal=False, window=2), None, None), torch.float32)
def test_every_mask_gives_what_the_definition_gives_in_float64(case, dtype: torch.dtype) -> None:
    check_against_the_definition(case, dtype)


@settings(max_examples=12, deadline=None)
@given(case=cases(st.integers(201, 20_000)), dtype=st.sampled_from(list(TYPES)))
def test_long_rows_do_too(case, dtype: torch.dtype) -> None:
    check_against_the_definition(case, dtype)


def check_against_the_definition(case, dtype: torch.dtype) -> None:
    scores, visible, softcap, sinks = case
    scores = scores.to(dtype)
    narrow = None if sinks is None else sinks.float()
    ours = results(softmax_with_statistics, scores, visible, softcap, narrow)
    wide = None if narrow is None else narrow.double()
    wanted = results(reference_softmax, scores.double(), visible, softcap, wide)
    tolerances = [TYPES[dtype], 1e-6, 2e-6, TYPES[dtype], max(TYPES[dtype], 1e-5)]
    # A gradient is what is left of p * g when its mean is taken away, and an entropy of the logarithm of the sum when
    # the mean score is: either may be next to nothing.
    terms = (wanted[0] * noise(*scores.shape, seed=7)).norm().item()
    logarithms = wanted[1].masked_fill(wanted[1] == -torch.inf, 0).norm().item()
    for a, b, tolerance, size in zip(ours, wanted, tolerances, [1e-2, 1e-2, logarithms, terms, terms], strict=False):
        assert distance(a, b, max(size, 1e-2)) < tolerance
    seen = wanted[0] != 0
    assert not ours[0][~seen].any(), "what is hidden has no share"
    assert not ours[3][~seen].any(), "and no gradient"


def test_the_definition_itself_is_torchs_softmax_of_masked_scores() -> None:
    scores = noise(2, 3, 6, 9).requires_grad_()
    visible = mostly(0.7, 2, 1, 6, 9, seed=5) | (torch.arange(9) == 0)
    grad = noise(2, 3, 6, 9, seed=2)
    wanted = torch.softmax((scores * 0.7).masked_fill(~visible, -torch.inf), -1)
    p, statistics = reference_softmax(scores, Visibility(allowed=visible), 0.7)
    torch.testing.assert_close(p, wanted)
    torch.testing.assert_close(statistics.entropy, torch.distributions.Categorical(probs=wanted).entropy())
    for a, b in zip(*(torch.autograd.grad(x, scores, grad) for x in (p, wanted)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_gradients_are_those_of_finite_differences(softcap: float | None) -> None:
    scores, sinks = noise(2, 2, 3, 6).requires_grad_(), noise(2, seed=1).requires_grad_()
    visible = Visibility(causal=True, window=4, padding_BK=mostly(0.7, 2, 6, seed=3))
    assert torch.autograd.gradcheck(lambda x, s: fused_softmax(x, visible, 0.8, softcap, s), (scores, sinks))
    assert torch.autograd.gradcheck(lambda x: fused_softmax(x, visible, 0.8, softcap), (scores,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_over_its_gradients_memory_it_gives_the_same_gradients(dtype: torch.dtype) -> None:
    scores, visible, sinks = noise(2, 2, 5, 70).to(dtype), Visibility(causal=True, window=9), noise(2).to(dtype)
    apart = results(fused_softmax, scores, visible, 4.0, sinks)
    over = results(fused_softmax, scores, visible, 4.0, sinks, overwrites_gradient=True)
    assert all(torch.equal(a, b) for a, b in zip(apart, over, strict=True))
    x, grad = scores.requires_grad_(), noise(2, 2, 5, 70).to(dtype)
    before = grad.clone()
    (gradient,) = torch.autograd.grad(fused_softmax(x, visible, overwrites_gradient=True), x, grad)
    assert torch.equal(gradient, grad)
    assert not torch.equal(gradient, before)


def test_first_keys_are_where_documents_or_rows_begin() -> None:
    ends = torch.tensor([0, 3, 10, 12], dtype=torch.int32)
    assert first_keys(ends, 2).tolist() == [[0, 0, 0, 3, 3, 3], [0, 0, 0, 0, 4, 4]]


def test_extreme_and_broken_scores_stay_where_they_are() -> None:
    scores = torch.zeros(1, 1, 4, 40)
    scores[..., 0, 5], scores[..., 1, :] = 1e30, -1e30
    scores[..., 2, 39] = torch.nan
    p = fused_softmax(scores)[0, 0]
    assert p[0, 5] == 1
    assert p[0].sum() == 1
    torch.testing.assert_close(p[[1, 3]], torch.full((2, 40), 1 / 40))
    assert p[2].isnan().all()


def test_what_does_not_fit_the_scores_is_refused() -> None:
    scores = torch.zeros(2, 1, 3, 4)
    with pytest.raises(ValueError, match="padding_BK"):
        fused_softmax(scores, Visibility(padding_BK=torch.ones(2, 3, dtype=torch.bool)))
    with pytest.raises(ValueError, match="first_key_BQ"):
        fused_softmax(scores, Visibility(first_key_BQ=torch.zeros(2, 3, dtype=torch.int64)))


def test_sinks_windows_and_soft_caps_that_cannot_be_are_refused() -> None:
    scores = torch.zeros(2, 4, 3, 4)
    for sinks in (torch.zeros(2), torch.zeros(4, dtype=torch.int64), torch.zeros(4, device="meta")):
        with pytest.raises(ValueError, match="sinks_H is"):
            fused_softmax(scores, sinks_H=sinks)
    for window in (0, -1):
        with pytest.raises(ValueError, match=f"window={window} is no number of tokens"):
            fused_softmax(scores, Visibility(window=window))
    for softcap in (-3.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="bounds no score"):
            fused_softmax(scores, softcap=softcap)


def test_the_widest_window_hides_nothing() -> None:
    scores = noise(1, 2, 7, 3).float()  # of queries that stand before the first key, too
    for causal in (False, True):
        wide = fused_softmax(scores, Visibility(causal, window=2**63 - 1))
        assert torch.equal(wide, fused_softmax(scores, Visibility(causal)))


def test_second_derivatives_are_refused_and_never_wrong() -> None:
    scores = noise(1, 1, 3, 5).float().requires_grad_()
    for overwrites in (False, True):
        p = fused_softmax(scores, overwrites_gradient=overwrites)
        (gradient,) = torch.autograd.grad(p.square().sum(), scores, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            torch.autograd.grad(gradient.square().sum(), scores)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)])
def test_empty_scores_give_empty_probabilities(shape: tuple[int, ...]) -> None:
    scores = torch.zeros(shape).requires_grad_()
    p, statistics = softmax_with_statistics(scores, Visibility(causal=True))
    assert p.shape == shape
    assert (statistics.largest == -torch.inf).all()
    assert torch.autograd.grad(p.sum(), scores)[0].shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operators_are_registered_soundly(dtype: torch.dtype) -> None:
    scores, sinks = noise(1, 2, 3, 5).to(dtype).requires_grad_(), noise(2).to(dtype).requires_grad_()
    for softcap, statistics in ((0.0, True), (2.0, False)):
        arguments = (scores, None, None, None, sinks, True, 0, 0.5, softcap, statistics, False)
        torch.library.opcheck(torch.ops.megalm.fused_softmax.default, arguments)


def check_all_types() -> None:
    """A masked case in each type, forward and backward, what is not a number, and the 65,536 numbers of float16."""
    for dtype, tolerance in TYPES.items():
        for place, keys in ((0, 3), (5, 20), (39, 40)):
            scores = noise(1, 1, 2, keys).to(dtype)
            scores[0, 0, 0, place] = torch.nan
            p, statistics = softmax_with_statistics(scores)
            for x in (p, *statistics):
                assert x[0, 0, 0].isnan().all()
                assert x[0, 0, 1].isfinite().all()
        every_bit = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # rounded up, it would be -0
        assert fused_softmax(scores, sinks_H=every_bit).isnan().all()
        for softcap in (None, 3.0):
            scores = (6 * noise(2, 2, 3, 75)).to(dtype)
            scores[0, 0, 0, :4] = torch.tensor([6e4, -6e4, 1e-7, 0])
            visible, sinks = Visibility(True, 70, padding_BK=mostly(0.8, 2, 75, seed=2)), noise(2).float()
            ours = results(softmax_with_statistics, scores, visible, softcap, sinks)
            wanted = results(reference_softmax, scores.double(), visible, softcap, sinks.double())
            for a, b in zip(ours, wanted, strict=True):
                assert distance(a, b) < max(tolerance, 2e-6)
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    largest = softmax_with_statistics(numbers[None, None, :, None])[1].largest.flatten()
    torch.testing.assert_close(largest, numbers.float(), rtol=0, atol=0, equal_nan=True)


def test_all_types_are_read_and_written_right() -> None:
    check_all_types()


@pytest.mark.parametrize(("capability", "name"), [("default", "portable"), ("avx2", "avx2")])
def test_an_older_instruction_set_does_it_too(capability: str, name: str) -> None:
    if native.instruction_set() not in ("avx2", "avx512"):
        pytest.skip("the portable kernels are this machine's best, or there are none")
    program = f"import test_fused_softmax as t; assert t.native.instruction_set() == {name!r}; t.check_all_types()"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=120, check=True)
