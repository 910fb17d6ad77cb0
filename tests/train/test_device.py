from __future__ import annotations

import pytest
import torch

from megalm.train.device import gpu_peak, measured_matmul


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_gpus_are_known_by_the_words_of_their_names(name: str, peak: float | None) -> None:
    """Dense bfloat16 rates of the makers' data sheets."""
    assert gpu_peak(name) == (pytest.approx(peak, rel=0.01) if peak else None)


def test_a_measured_rate_is_one_that_a_processor_can_have() -> None:
    assert 1e8 < measured_matmul(torch.device("cpu"), torch.float32, seconds=0.1) < 1e14
