"""Dropout whose mask is a function of (key of the sequence, token's place in it, site, column) and of nothing else: no
layout, micro-batch size or recomputation changes it, and a rank draws only what it holds.

    key of the sequence --mix--> key of the row --mix--> key of (row, site) --mix--> a random number for each column

`mix` of 64 bits is SplitMix64's last steps (doi 10.1145/2660193.2660195, section 3). The last one, of which there are
as many as elements, mixes both halves of the key in 32 bits (the constants are Chris Wellons's `lowbias32`) and is
several times faster. A generator would have to be drawn up to the rows that are wanted.

Shapes: B sequences, S tokens of each, T = B * S, R some of the T rows, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15


def _signed(number: int, bits: int) -> int:
    """The same bits as torch's signed integers have them."""
    number &= (1 << bits) - 1
    return number - (1 << bits) if number >> (bits - 1) else number


def _shifted(x: Tensor, by: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> by) & ((1 << (x.element_size() * 8 - by)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB, 64)
    return x ^ _shifted(x, 31)


def sequence_keys(seed: int, samples_B: Tensor) -> Tensor:
    """Keys, int64 [B], of the sequences with these numbers (int64, each once in a run)."""
    return _mix(_mix(samples_B + 1) ^ _signed(seed * GOLDEN, 64))


def row_keys(keys_B: Tensor, length: int) -> Tensor:
    """Keys, int64 [T], of the tokens of sequences of `length` tokens."""
    place_S = torch.arange(1, length + 1, device=keys_B.device) * _signed(GOLDEN, 64)
    return _mix(keys_B[:, None] + place_S).flatten()


def dropout(x_RD: Tensor, keys_R: Tensor, site: int, rate: float) -> Tensor:
    """`x_RD` with a share `rate` of its elements zero and the others divided by 1 - rate. Each `site` of the model has
    masks of its own."""
    key_R1 = _mix(keys_R + _signed((site + 1) * GOLDEN, 64))[:, None]
    column_D = torch.arange(1, x_RD.shape[-1] + 1, dtype=torch.int32, device=x_RD.device) * _signed(GOLDEN >> 32, 32)
    bits_RD = column_D ^ key_R1.to(torch.int32)
    bits_RD = (bits_RD ^ _shifted(bits_RD, 16)) * 0x7FEB352D
    bits_RD = bits_RD ^ (key_R1 >> 32).to(torch.int32)
    bits_RD = (bits_RD ^ _shifted(bits_RD, 15)) * _signed(0x846CA68B, 32)
    bits_RD = bits_RD ^ _shifted(bits_RD, 16)
    kept_RD = bits_RD >= int(rate * 2**32) - 2**31
    return torch.where(kept_RD, x_RD / (1 - rate), 0)
