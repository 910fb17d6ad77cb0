"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split convention of the Hugging Face models.

Pair (i, i + E/2) of a head turns by the angle position * theta^(-2i/E). Shapes: T tokens, H heads, E head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_frequencies(head_dim: int, theta: float) -> Tensor:
    """Angle a position, float32 [E/2]."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)


def llama3_scaled(
    frequencies: Tensor, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> Tensor:
    """Llama 3's scaling (arXiv 2407.21783 and its published code): long wavelengths are stretched by `factor`, short
    ones kept, and those between blended linearly in original_length / wavelength."""
    wavelengths = 2 * math.pi / frequencies
    blend = ((original_length / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies / factor * (1 - blend) + frequencies * blend


def rotary_tables(positions_T: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, 1, E/2]: computed in float32 or wider, given in `dtype`."""
    angles = positions_T.to(frequencies.dtype)[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x_THE: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each head's pairs by its token's angles."""
    cos, sin = tables
    a, b = x_THE.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
