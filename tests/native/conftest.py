from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_kernels import emulated_softmax

from megalm.ops import native


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernels on the CPU."""
    return emulated_softmax(tmp_path_factory.mktemp("emulated") / "kernels.so")


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> tuple[ctypes.CDLL, str]:
    """The CUDA kernels and the device of the tensors that they take: emulated on the CPU, or built on a GPU."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated"), "cpu"
    library = native.library("cuda")
    if not torch.cuda.is_available() or library is None:
        pytest.skip("needs a GPU, and the kernels built for it")
    return library, "cuda"
