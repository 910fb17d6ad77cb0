"""The CUDA kernels of the softmax cross-entropy against float64: the very sources, emulated on the CPU, and with
`-m gpu` on a GPU."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import pytest
import torch
from cuda_kernels import Guarded, empty, error_of
from torch import Tensor

from megalm.ops import native

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@dataclass
class Case:
    """Logits of T tokens over V words, and what the loss is made of."""

    logits: Tensor
    targets: Tensor
    weight: Tensor
    softcap: float = 0.0
    z_loss: float = 0.0
    smoothing: float = 0.0

    def capped(self) -> tuple[Tensor, Tensor]:
        """The logits, to be differentiated by, and what the soft-cap makes of them, in float64."""
        z = self.logits.double().requires_grad_()
        return z, self.softcap * torch.tanh(z / self.softcap) if self.softcap else z

    def expected(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Largest logit, sum of exponentials, target's logit, sum of logits, and the gradient, all in float64."""
        leaf, z = self.capped()
        vocabulary = z.shape[1]
        is_word = (self.targets >= 0) & (self.targets < vocabulary)
        target = z.gather(1, self.targets.where(is_word, 0)[:, None])[:, 0].where(is_word, 0)
        lse = z.logsumexp(1)
        spread = self.smoothing * z.mean(1)
        loss = (self.weight.double() * (lse - (1 - self.smoothing) * target - spread + self.z_loss * lse**2)).sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        z = z.detach()
        return z.amax(1), (z - z.amax(1, keepdim=True)).exp().sum(1), target.detach(), z.sum(1), grad


def case(tokens: int, words: int, dtype: torch.dtype, **settings: float) -> Case:
    generator = torch.Generator().manual_seed(words)
    logits = (torch.randn(tokens, words, generator=generator) * 3).to(dtype)
    targets = torch.randint(-2, words + 2, (tokens,), generator=generator)
    weight = torch.rand(tokens, generator=generator) + 0.5
    return Case(logits, targets, weight, **settings)


def statistics(library: ctypes.CDLL, device: str, logits: Tensor, targets: Tensor, softcap: float) -> list[Tensor]:
    rows, columns = logits.shape
    out = [empty(torch.zeros(rows, device=device), 1) for _ in range(4)]
    pointers = [x.tensor.data_ptr() for x in out]
    arguments = (rows, columns, native.DTYPES[logits.dtype], logits.data_ptr(), targets.data_ptr(), softcap, *pointers)
    assert library.megalm_cross_entropy_statistics(*arguments, 0) == 0
    assert all(x.is_whole() for x in out)
    return [x.tensor.cpu() for x in out]


def gradient(
    library: ctypes.CDLL, logits: Tensor, targets: Tensor, lse: Tensor, given: Case, words: int, to: Tensor
) -> None:
    lse, weight = lse.to(logits.device), given.weight.to(logits.device)
    tensors = (x.data_ptr() for x in (logits, targets, lse, weight))
    hit, spread = 1 - given.smoothing, given.smoothing / words
    settings = (given.softcap, given.z_loss, hit, spread)
    arguments = (*logits.shape, native.DTYPES[logits.dtype], *tensors, *settings, to.data_ptr())
    assert library.megalm_cross_entropy_backward(*arguments, 0) == 0


def check(kernels: tuple[ctypes.CDLL, str], given: Case, offset: int = 0) -> None:
    library, device = kernels
    logits = Guarded(given.logits.to(device), offset, math.nan).tensor
    targets = given.targets.to(device)
    largest, exponentials, target, total, grad = given.expected()
    actual = statistics(library, device, logits, targets, given.softcap)
    for one, want in zip(actual, (largest, exponentials, target, total), strict=True):
        assert error_of(one, want) < 2e-6
    lse = actual[0] + actual[1].log()
    to = empty(logits, (offset + 1) % 5)
    gradient(library, logits, targets, lse, given, logits.shape[1], to.tensor)
    # A float32 lse of about 10 is off by 5e-7, and all of a row's probabilities with it.
    assert error_of(to.tensor, grad) < max(2e-6, TOLERANCE[logits.dtype])
    assert to.is_whole()
    gradient(library, logits, targets, lse, given, logits.shape[1], logits)
    assert torch.equal(logits, to.tensor)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("words", [1, 31, 1000, 4097, 9001])
def test_statistics_and_gradient_are_right(kernels: tuple[ctypes.CDLL, str], words: int, dtype: torch.dtype) -> None:
    check(kernels, case(3, words, dtype), offset=words % 7)


@pytest.mark.parametrize("settings", [{"softcap": 3.0}, {"z_loss": 0.01}, {"smoothing": 0.2}])
def test_each_term_of_the_loss_is_right(kernels: tuple[ctypes.CDLL, str], settings: dict[str, float]) -> None:
    check(kernels, case(2, 700, torch.float32, **settings), offset=1)
    check(kernels, case(2, 700, torch.bfloat16, **settings, **({"z_loss": 0.1} if "z_loss" not in settings else {})))


def test_parts_of_a_vocabulary_add_up_to_the_whole(kernels: tuple[ctypes.CDLL, str]) -> None:
    library, device = kernels
    given = case(4, 900, torch.float32, z_loss=0.05, smoothing=0.1)
    largest, exponentials, target, total, grad = given.expected()
    parts = []
    for first, end in ((0, 333), (333, 900)):
        logits, targets = given.logits[:, first:end].contiguous().to(device), (given.targets - first).to(device)
        # A target past the last word must be outside every part.
        parts.append((logits, targets, *statistics(library, device, logits, targets, 0.0)))
    lse = torch.stack([part[2] + part[3].log() for part in parts]).logsumexp(0)
    assert error_of(lse, largest + exponentials.log()) < 1e-6
    assert error_of(parts[0][4] + parts[1][4], target) < 1e-6
    assert error_of(parts[0][5] + parts[1][5], total) < 2e-6
    grads = []
    for logits, targets, *_ in parts:
        grads.append(torch.empty_like(logits))
        gradient(library, logits, targets, lse, given, 900, grads[-1])
    assert error_of(torch.cat(grads, 1), grad) < 2e-6


def test_rows_of_no_weight_have_no_gradient_whatever_they_hold(kernels: tuple[ctypes.CDLL, str]) -> None:
    library, device = kernels
    given = case(3, 300, torch.bfloat16)
    given.logits[1] = math.nan
    given.weight[1] = 0
    logits, targets = given.logits.to(device), given.targets.to(device)
    lse = torch.logsumexp(given.logits.float(), 1)
    to = torch.full_like(logits, math.nan)
    gradient(library, logits, targets, lse, given, 300, to)
    assert not to[1].any()
    assert to[[0, 2]].isfinite().all()
    assert to[0].any()


def test_no_rows_are_no_error(kernels: tuple[ctypes.CDLL, str]) -> None:
    library, device = kernels
    nothing = torch.empty(0, 9, device=device)
    assert statistics(library, device, nothing, torch.empty(0, dtype=torch.int64, device=device), 0.0)[0].shape == (0,)


@pytest.mark.full
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("words", [2, 4, 8, 63, 511, 512, 2048, 4095, 8192, 20000, 50257])
def test_vocabularies_types_and_alignments(kernels: tuple[ctypes.CDLL, str], words: int, dtype: torch.dtype) -> None:
    for offset in range(9):
        check(kernels, case(2, words, dtype, softcap=10.0, z_loss=0.01, smoothing=0.1), offset)
