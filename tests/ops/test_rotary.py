from __future__ import annotations

import torch

from megalm.ops.rotary import apply_rotary, rotary_frequencies, rotary_tables


def test_scores_depend_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 32, generator=generator, dtype=torch.float64)
    frequencies = rotary_frequencies(32, 10000.0).double()

    def score(a: int, b: int) -> torch.Tensor:
        at = [rotary_tables(torch.tensor([position]), frequencies, torch.float64) for position in (a, b)]
        return (apply_rotary(q, at[0]) * apply_rotary(k, at[1])).sum()

    torch.testing.assert_close(score(5, 2), score(1003, 1000))
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_it_is_a_rotation_of_complex_pairs() -> None:
    x_THE = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    frequencies = rotary_frequencies(16, 500.0).double()
    turned = apply_rotary(x_THE, rotary_tables(torch.arange(6), frequencies, torch.float64))
    pairs = torch.complex(x_THE[..., :8], x_THE[..., 8:])
    wanted = pairs * torch.exp(1j * torch.arange(6)[:, None, None] * frequencies)
    torch.testing.assert_close(torch.complex(turned[..., :8], turned[..., 8:]), wanted)
