"""Which library serves a tensor."""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace

import pytest
import torch

from megalm.ops import native
from megalm.ops.softmax import fused_softmax

NO_IMAGE = 209  # CUDA's code of a device that a kernel was not built for


@pytest.mark.parametrize("error", [0, NO_IMAGE])
def test_a_gpu_for_which_the_kernels_were_not_built_is_left_to_torch(
    error: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "library", lambda kind: SimpleNamespace(megalm_kernel_image=lambda: error))
    monkeypatch.setattr(torch.cuda, "device", lambda gpu: contextlib.nullcontext())
    native.has_image.cache_clear()
    with caplog.at_level(logging.WARNING, logger="megalm"):
        assert [native.has_image(0), native.has_image(0)] == [error == 0] * 2
    native.has_image.cache_clear()
    assert len(caplog.messages) == (error != 0), "said once"
    assert all("MEGALM_CUDA_ARCHS" in message for message in caplog.messages)


def test_a_library_of_other_sources_is_left_alone_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if native.library("cpu") is None:
        pytest.skip("there is none")

    class Older(native.Mask):
        _fields_ = (("one_more", native.Long),)

    native.library.cache_clear()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="megalm"):
        patch.setattr(native, "Mask", Older)
        assert [native.library("cpu"), native.library("cpu")] == [None, None]
        assert fused_softmax(torch.zeros(1, 1, 1, 2)).tolist() == [[[[0.5, 0.5]]]]
    assert len([message for message in caplog.messages if "is of other sources" in message]) == 1
    native.library.cache_clear()
    assert native.library("cpu") is not None


def test_types_that_no_kernel_computes_are_left_to_torch() -> None:
    assert native.library_for(torch.zeros(1, dtype=torch.float64)) is None
    assert native.wide(torch.zeros(1, dtype=torch.float64)) == torch.float64
    assert native.wide(torch.zeros(1, dtype=torch.bfloat16)) == torch.float32
