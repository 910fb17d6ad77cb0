"""The CUDA kernels for tests: emulated on the CPU by cuda_emulation/, or on a GPU; and their definition in float64."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalm.ops import native
from megalm.ops.softmax import Settings

EMULATION = Path(__file__).parent / "native" / "cuda_emulation"
SOURCES = Path(__file__).parents[1] / "csrc" / "fused_softmax"
SENTINEL = 7.0  # of what no kernel may write to


def build_emulated(output: Path, *sources: Path) -> Path:
    """A library of .cu files, compiled by the host's compiler. Where this has the means, what C++ leaves undefined,
    such as a vector load off alignment, ends the process."""
    compiler = os.environ.get("CXX", "c++")
    asked = [compiler, "-print-file-name=libubsan.so"]
    runtime = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    checks = ["-fsanitize=undefined", "-fno-sanitize-recover=all"] if os.path.isabs(runtime) else []
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", *checks]
    command += ["-DMEGALM_CUDA_EMULATION", f"-I{EMULATION}", "-x", "c++", *map(str, sources), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


def emulated_softmax(output: Path) -> ctypes.CDLL:
    """csrc/fused_softmax's kernels, emulated, with the signatures of the real library."""
    library = native.bind(ctypes.CDLL(str(build_emulated(output, *sorted(SOURCES.glob("*.cu"))))))
    library.cuda_emulation_last_kernel.restype = ctypes.c_void_p
    return library


def nvcc() -> str | None:
    """CUDA's compiler, where setup.py looks for it."""
    home = f"{os.environ.get('CUDA_HOME', '')}/bin/nvcc"
    found = (path for path in (home, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if path)
    return next((path for path in found if os.access(path, os.X_OK)), None)


class Guarded:
    """A tensor within a larger buffer, some elements off an address that is aligned."""

    def __init__(self, like: Tensor, offset: int, outside: float = SENTINEL) -> None:
        self.outside = outside
        self.buffer = torch.full((like.numel() + offset + 64,), outside, dtype=like.dtype, device=like.device)
        self.inside = slice(offset, offset + like.numel())
        self.tensor = self.buffer[self.inside].view(like.shape)
        self.tensor.copy_(like)

    def is_whole(self) -> bool:
        """Whether nothing around the tensor was written to."""
        around = self.buffer.clone()
        around[self.inside] = self.outside
        return bool((around == self.outside).all())


def empty(like: Tensor, offset: int) -> Guarded:
    """A place for a result, full of what no kernel gives."""
    return Guarded(torch.full_like(like, SENTINEL), offset)


def error_of(actual: Tensor, wanted: Tensor, size: Tensor | float | None = None) -> float:
    """Norm of the difference over that of what is wanted; or over that of `size`, the terms it is the difference of."""
    actual, wanted = actual.double().cpu().flatten(), wanted.double().cpu().flatten()
    same = (actual == wanted) | (actual.isnan() & wanted.isnan())  # infinities, too
    difference = float((actual - wanted).masked_fill(same, 0).norm())
    norm = float((wanted if size is None else torch.as_tensor(size, dtype=torch.float64)).nan_to_num(0, 0, 0).norm())
    return difference / (norm or 1.0)


@dataclass(frozen=True)
class Expected:
    """What a softmax gives, in float64; gradients for a given gradient of the probabilities."""

    probabilities: Tensor
    lse: Tensor
    largest: Tensor
    entropy: Tensor
    grad_scores: Tensor
    grad_sink: Tensor | None
    grad_size: Tensor
    sink_size: Tensor
    """Of the terms whose differences the two gradients are: what they are rounded to is relative to these."""


def visible(shape: torch.Size, settings: Settings) -> Tensor:
    """bool [B, H, Q, K], written down from the sentences of mask.hpp, key by key."""
    B, _, Q, K = shape
    seen = torch.ones(shape, dtype=torch.bool)
    for query in range(Q):
        at = query + K - Q
        for key in range(K) if settings.causal or settings.window else ():
            if (settings.causal and key > at) or (settings.window and key <= at - settings.window):
                seen[:, :, query, key] = False
    if settings.first_key is not None:
        for batch in range(B):
            for query in range(Q):
                seen[batch, :, query, : int(settings.first_key[batch, query])] = False
    if settings.padding is not None:
        seen &= settings.padding.cpu()[:, None, None, :]
    if settings.allowed is not None:
        seen &= settings.allowed.cpu()
    return seen


def expected(scores: Tensor, grad: Tensor, settings: Settings) -> Expected:
    """By torch's softmax and autograd in float64, with the sink as one more key."""
    scores = scores.detach().cpu().double().requires_grad_()
    seen = visible(scores.shape, settings)
    s = scores * settings.scale
    if settings.softcap:
        s = settings.softcap * torch.tanh(s / settings.softcap)
    s = s.masked_fill(~seen, -torch.inf)
    sinks = torch.full(scores.shape[1:2], -torch.inf) if settings.sinks is None else settings.sinks.cpu()
    sink = sinks.double()[:, None, None].expand(*scores.shape[:-1], 1).clone().requires_grad_()
    terms = torch.cat([s, sink], -1)
    is_empty = (terms == -torch.inf).all(-1, keepdim=True)
    p = torch.softmax(terms.masked_fill(is_empty, 0.0), -1).masked_fill(is_empty, 0.0)
    loss = (p[..., :-1] * grad.cpu().double().masked_fill(~seen, 0)).sum()
    grad_scores, grad_sink = torch.autograd.grad(loss, (scores, sink))
    p = p.detach()
    grads = p[..., :-1] * grad.cpu().double().masked_fill(~seen, 0)
    return Expected(
        p[..., :-1],
        terms.logsumexp(-1).detach(),
        torch.cat([s, torch.full_like(sink, -torch.inf)], -1).amax(-1).detach(),
        torch.special.entr(p).sum(-1).detach(),
        grad_scores,
        None if settings.sinks is None else grad_sink[..., 0],
        settings.scale * (grads.abs() + p[..., :-1] * grads.abs().sum(-1, keepdim=True)),
        p[..., -1] * grads.abs().sum(-1),
    )
