from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.ops import cross_entropy as module
from megalm.ops.cross_entropy import linear_cross_entropy, reference_cross_entropy


def inputs(tokens: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    w_VD = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    labels_T = torch.randint(vocab, (tokens,), generator=generator)
    counted_T = torch.rand(tokens, generator=generator) < 0.8
    return x_TD.to(dtype).requires_grad_(), w_VD.to(dtype).requires_grad_(), labels_T, counted_T


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 900),
    vocab=st.integers(2, 200),
    z_loss=st.sampled_from([0.0, 1e-3, 0.1]),
    softcap=st.none() | st.floats(1.0, 30.0),
    smoothing=st.sampled_from([0.0, 0.1, 0.6]),
)
def test_it_equals_the_unsliced_definition_in_float64(
    tokens: int, vocab: int, z_loss: float, softcap: float | None, smoothing: float
) -> None:
    x_TD, w_VD, labels_T, counted_T = inputs(tokens, 12, vocab, torch.float64)
    results = []
    for function in (linear_cross_entropy, reference_cross_entropy):
        objective, cross_entropy = function(x_TD, w_VD, labels_T, counted_T, z_loss, softcap, smoothing=smoothing)
        results.append([objective, cross_entropy, *torch.autograd.grad(objective * 0.37, (x_TD, w_VD))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_types_stay_close_to_float64(dtype: torch.dtype, tolerance: float) -> None:
    x_TD, w_VD, labels_T, counted_T = inputs(700, 32, 500, dtype)
    weights_VD = w_VD.detach().float().requires_grad_()  # float32 masters of a narrow product
    objective, cross_entropy = linear_cross_entropy(x_TD, weights_VD, labels_T, counted_T, 1e-3)
    ours = [objective, cross_entropy, *torch.autograd.grad(objective, (x_TD, weights_VD))]
    x, w = x_TD.detach().double().requires_grad_(), w_VD.detach().double().requires_grad_()
    objective, cross_entropy = reference_cross_entropy(x, w, labels_T, counted_T, 1e-3)
    wanted = [objective, cross_entropy, *torch.autograd.grad(objective, (x, w))]
    assert ours[-1].dtype == torch.float32, "the weight's gradient is summed in the weight's type"
    for a, b in zip(ours, wanted, strict=True):
        assert (a.double() - b).norm() / b.norm() < tolerance


def test_calls_that_share_a_pool_hold_one_gradient_of_the_weight_which_is_that_of_all() -> None:
    gradients = {}
    for shares in (False, True):
        pool: list[torch.Tensor] | None = [] if shares else None
        x_TD, w_VD, labels_T, counted_T = inputs(90, 12, 50, torch.float64)
        calls = [linear_cross_entropy(x, w_VD, y, c, 0.1, pool=pool)[0]
                 for x, y, c in zip(x_TD.split(30), labels_T.split(30), counted_T.split(30), strict=True)]  # fmt: skip
        assert pool is None or [tuple(held.shape) for held in pool] == [(50, 12)]
        for objective in calls:
            objective.backward()
        assert not pool
        gradients[shares] = x_TD.grad, w_VD.grad
    for apart, together in zip(*gradients.values(), strict=True):
        assert apart is not None
        assert torch.equal(apart, together)


def test_extreme_logits_give_finite_losses() -> None:
    x_TD = torch.tensor([[100.0, 0.0], [-100.0, 0.0]], requires_grad=True)
    w_VD = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [0.0, 1.0]])
    objective, cross_entropy = linear_cross_entropy(x_TD, w_VD, torch.tensor([1, 1]), torch.tensor([True, True]))
    assert cross_entropy.item() == pytest.approx(1000.0)
    assert torch.isfinite(torch.autograd.grad(objective, x_TD)[0]).all()


def test_memory_is_that_of_a_slice_and_not_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocab = 2048, 4096
    monkeypatch.setattr(module, "SLICE_LOGITS", 256 * vocab)
    monkeypatch.setattr(module, "MIN_SLICE", 256)
    x_TD, w_VD, labels_T, counted_T = inputs(tokens, 16, vocab, torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        objective, _ = linear_cross_entropy(x_TD, w_VD, labels_T, counted_T)
        objective.backward()
    assert largest == 256 * vocab


def test_without_gradients_none_is_computed() -> None:
    x_TD, w_VD, labels_T, counted_T = inputs(300, 16, 50, torch.float64)
    products = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal products
            products += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.out)
            return func(*args, **(kwargs or {}))

    with Count(), torch.no_grad():
        alone = linear_cross_entropy(x_TD, w_VD, labels_T, counted_T)[1]
    assert products == 1
    torch.testing.assert_close(alone, reference_cross_entropy(x_TD, w_VD, labels_T, counted_T)[1])
    with Count():
        linear_cross_entropy(x_TD, w_VD, labels_T, counted_T)
    assert products == 1 + 3
