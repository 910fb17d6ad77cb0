from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalm.ops.dropout import dropout, row_keys, sequence_keys

KEYS_T = row_keys(sequence_keys(3, torch.arange(8) + 100), 64)
ONES_TD = torch.ones(512, 300)


def kept(keys_R: torch.Tensor, site: int = 0, rate: float = 0.25) -> torch.Tensor:
    return dropout(ONES_TD[: len(keys_R)], keys_R, site, rate) != 0


@given(first=st.integers(0, 7), count=st.integers(1, 8), start=st.integers(0, 63))
def test_the_mask_is_a_function_of_the_sample_and_the_place_in_it(first: int, count: int, start: int) -> None:
    keys_T = row_keys(sequence_keys(3, torch.arange(8)[first : first + count] + 100), 64)
    begin = first * 64 + start
    assert torch.equal(kept(keys_T[start:]), kept(KEYS_T)[begin : begin + len(keys_T) - start])


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.9])
def test_the_share_that_is_dropped_is_the_rate_and_the_mean_stays(rate: float) -> None:
    x_TD = dropout(ONES_TD, KEYS_T, 7, rate)
    deviation = (rate * (1 - rate) / ONES_TD.numel()) ** 0.5
    assert (x_TD == 0).double().mean().item() == pytest.approx(rate, abs=4 * deviation)
    assert x_TD.unique().tolist() == [0.0, pytest.approx(1 / (1 - rate))]
    for dim in (0, 1):  # no row and no column is favoured
        shares = (x_TD == 0).double().mean(dim)
        expected = (rate * (1 - rate) / x_TD.shape[dim]) ** 0.5
        assert shares.std().item() == pytest.approx(expected, rel=0.25)


def test_other_seeds_samples_places_and_sites_have_independent_masks() -> None:
    own = kept(KEYS_T).double()
    others = {
        "seed": kept(row_keys(sequence_keys(4, torch.arange(8) + 100), 64)),
        "sample": kept(KEYS_T.roll(64, 0)),
        "place": kept(KEYS_T.roll(1, 0)),
        "site": kept(KEYS_T, site=1),
        "column": kept(KEYS_T).roll(1, 1),
    }
    for name, other in others.items():
        both = (own * other.double()).mean().item()
        assert both == pytest.approx(0.75**2, abs=4 * (0.5625 * 0.4375 / own.numel()) ** 0.5), name


def test_what_is_dropped_gets_no_gradient() -> None:
    x_TD = torch.randn(512, 300, requires_grad=True)
    dropout(x_TD, KEYS_T, 0, 0.25).sum().backward()
    assert torch.equal(x_TD.grad, kept(KEYS_T) / 0.75)


def test_a_large_seed_is_a_seed() -> None:
    assert not torch.equal(sequence_keys(2**63 - 1, torch.arange(4)), sequence_keys(2**62, torch.arange(4)))
