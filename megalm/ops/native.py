"""The native libraries of csrc/fused_softmax, and which of them serves a tensor: the one place where that is decided.

    on the CPU     float32, float16, bfloat16     _fused_softmax_cpu, with the best instruction set of the machine
    on a GPU       the same                       _fused_softmax_cuda, where it was built
    anything else                                 none: the caller computes with torch

They see raw pointers, sizes and an executor (csrc/fused_softmax/softmax.h), never torch's headers, so that an upgrade
of torch asks for no rebuild. As with torch's own kernels, the environment's ATEN_CPU_CAPABILITY (`default`, `avx2`)
keeps the CPU's to an older instruction set.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

logger = logging.getLogger("megalm")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
Pointer, Long, Int, Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class Mask(ctypes.Structure):
    """The `Mask` of csrc/fused_softmax/mask.hpp."""

    _fields_ = (
        ("batch", Long),
        ("heads", Long),
        ("queries", Long),
        ("keys", Long),
        ("first_key", Pointer),
        ("padding", Pointer),
        ("allowed", Pointer),
        ("allowed_batch", Long),
        ("allowed_head", Long),
        ("allowed_query", Long),
        ("sinks", Pointer),
        ("window", Long),
        ("causal", ctypes.c_int32),
        ("scale", Float),
        ("softcap", Float),
    )


SIGNATURES: dict[str, list[Any]] = {  # the mask's pointer is the first of a softmax's
    "megalm_softmax_forward": [Pointer, Int] + 5 * [Pointer],
    "megalm_softmax_backward": [Pointer, Int] + 6 * [Pointer],
    "megalm_cross_entropy_statistics": [Long, Long, Int, Pointer, Pointer, Float] + 4 * [Pointer],
    "megalm_cross_entropy_backward": [Long, Long, Int] + 4 * [Pointer] + 4 * [Float] + [Pointer],
}


@functools.cache
def library(kind: Literal["cpu", "cuda"]) -> ctypes.CDLL | None:
    """The library, or None where it was not built, lacks what it was linked with, or is of other sources."""
    files = sorted(Path(__file__).parents[1].glob(f"_fused_softmax_{kind}*.so"))
    if not files:
        return None
    try:
        found = ctypes.CDLL(str(files[0]))
    except OSError:
        return None
    if not has_layout(found):
        logger.warning("%s is of other sources, so torch computes in its place: install megalm again", files[0])
        return None
    return bind(found)


def has_layout(found: ctypes.CDLL) -> bool:
    """Whether it means by `Mask` what is written here."""
    size = getattr(found, "megalm_mask_bytes", None)
    if size is None:
        return False
    size.restype = Long
    return bool(size() == ctypes.sizeof(Mask))


def bind(found: ctypes.CDLL) -> ctypes.CDLL:
    """The same library, with the types of its functions' arguments."""
    for name, arguments in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = [*arguments, ctypes.c_ssize_t], Int
    return found


@functools.cache
def has_image(gpu: int) -> bool:
    """Whether the kernels were built for the architecture of this GPU; where not, torch computes, and this says so."""
    cuda = library("cuda")
    if cuda is None:
        return False
    with torch.cuda.device(gpu):
        error = cuda.megalm_kernel_image()
    if error:
        logger.warning(
            "the CUDA kernels were not built for GPU %d (CUDA's error %d), so torch computes in their place: install "
            "megalm again with its architecture in MEGALM_CUDA_ARCHS",
            gpu,
            error,
        )
    return not error


def instruction_set() -> str | None:
    """What the CPU's kernels use, such as `avx512`; None where they were not built."""
    cpu = library("cpu")
    if cpu is None:
        return None
    cpu.megalm_instruction_set.restype = ctypes.c_char_p
    return cpu.megalm_instruction_set().decode()


def library_for(x: Tensor) -> ctypes.CDLL | None:
    """Which library computes with `x`, or None: torch does."""
    if x.dtype not in DTYPES:
        return None
    if x.device.type == "cpu":
        return library("cpu")
    return library("cuda") if x.is_cuda and has_image(x.get_device()) else None


def wide(x: Tensor) -> torch.dtype:
    """The type in which sums over x's elements are made: float32, or x's own if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def call(name: str, x: Tensor, *arguments: object) -> None:
    """Calls a function of the library that serves `x`, on x's device; tensors among the arguments become pointers."""
    found = library_for(x)
    assert found is not None, "the caller asks library_for first"
    plain = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        executor = torch.cuda.current_stream().cuda_stream if x.is_cuda else torch.get_num_threads()
        error = getattr(found, name)(*plain, executor)
    if error:
        raise RuntimeError(f"{name} failed with code {error} for {tuple(x.shape)} of {x.dtype} on {x.device}")
