from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.ops.logits import logit_gradient_, logit_statistics

# Of float32: lse is about 16 here, so that its last digit alone makes 1e-6 of a probability.
TYPES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(2, 100) | st.sampled_from([2047, 2048, 2049, 5000]),
    cut=st.floats(0.01, 0.99),
    softcap=st.sampled_from([0.0, 8.0]),
    z_loss=st.sampled_from([0.0, 0.05]),
    smoothing=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from(list(TYPES)),
)
def test_two_parts_of_the_vocabulary_give_the_loss_and_gradient_of_the_whole_in_float64(
    rows: int, columns: int, cut: float, softcap: float, z_loss: float, smoothing: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(columns)
    logits = (5 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(columns, (rows,), generator=generator)
    weight = torch.rand(rows, generator=generator, dtype=torch.float64)
    weight[0] = 0 if rows > 1 else 1

    wide = logits.double().requires_grad_()
    z = softcap * torch.tanh(wide / softcap) if softcap else wide
    each = F.cross_entropy(z, targets, reduction="none", label_smoothing=smoothing) + z_loss * z.logsumexp(-1) ** 2
    (wanted,) = torch.autograd.grad((each * weight).sum(), wide)

    first = max(1, int(columns * cut))
    parts = [(logits[:, :first].contiguous(), targets), (logits[:, first:].contiguous(), targets - first)]
    found = [logit_statistics(part, local, softcap, smoothing > 0) for part, local in parts]
    lse = torch.stack([largest + exponentials.log() for largest, exponentials, _, _ in found]).logsumexp(0)
    target = found[0][2] + found[1][2]
    tolerance = max(TYPES[dtype], 1e-12) if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(lse.double(), z.logsumexp(-1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(target.double(), z.gather(1, targets[:, None])[:, 0], rtol=tolerance, atol=tolerance)
    if smoothing:
        torch.testing.assert_close((found[0][3] + found[1][3]).double(), z.sum(-1), rtol=1e-5, atol=1e-3)
    for part, local in parts:
        spread = smoothing / columns
        logit_gradient_(part, local, lse, weight.to(lse.dtype), softcap, z_loss, 1 - smoothing, spread)
    ours = torch.cat([part for part, _ in parts], 1).double()
    assert (ours - wanted).norm() <= TYPES[dtype] * max(wanted.norm().item(), weight.norm().item())
    assert not ours[weight == 0].any()


@pytest.mark.parametrize("dtype", TYPES)
def test_a_broken_logit_breaks_its_row_and_no_other(dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 5000, dtype=dtype)
    logits[0, 3] = logits[2] = torch.nan
    logits[3, :2100] = torch.nan
    largest, exponentials, _, _ = logit_statistics(logits, torch.zeros(4, dtype=torch.int64), 0.0, False)
    assert (largest + exponentials.log()).isnan().tolist() == [True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_targets_and_rows_that_do_not_fit_the_logits_are_refused(dtype: torch.dtype) -> None:
    logits, targets = torch.zeros(4, 10, dtype=dtype), torch.tensor([1, 2, 3, 4])
    row = torch.ones(4, dtype=torch.promote_types(dtype, torch.float32))
    other = torch.float32 if dtype == torch.float64 else torch.float64
    for wrong in (targets.int(), targets[:1]):
        with pytest.raises(ValueError, match="targets is"):
            logit_statistics(logits, wrong, 0.0, False)
        with pytest.raises(ValueError, match="targets is"):
            logit_gradient_(logits, wrong, row, row, 0.0, 0.0, 1.0, 0.0)
    for lse, weight in ((row.to(other), row), (row, row.to(other)), (row[:3], row), (row, row[:3])):
        with pytest.raises(ValueError, match="lse or weight is"):
            logit_gradient_(logits, targets, lse, weight, 0.0, 0.0, 1.0, 0.0)


def test_logits_that_cannot_be_overwritten_are_refused() -> None:
    logits, row = torch.zeros(10, 4).t(), torch.ones(4)
    with pytest.raises(ValueError, match="have to be contiguous"):
        logit_gradient_(logits, torch.zeros(4, dtype=torch.int64), row, row, 0.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operators_are_registered_soundly(dtype: torch.dtype) -> None:
    logits, targets = torch.randn(3, 7, dtype=dtype), torch.tensor([0, 6, 9])
    torch.library.opcheck(torch.ops.megalm.logit_statistics.default, (logits, targets, 2.0, True))
    arguments = (logits, targets, logits.logsumexp(-1), torch.ones(3, dtype=dtype), 0.0, 0.1, 0.9, 0.01)
    torch.library.opcheck(torch.ops.megalm.logit_gradient_.default, arguments)
