"""The fused masked softmax, and the sliced head with its loss, against eager torch, in turn in one process.

    softmax   forward and backward of scale, mask, softmax over [1, heads, N, N] scores
    head      forward and backward of the output head and cross-entropy; the peer makes all logits at once

Prints the best time of each and the ratio, and for the softmax the traffic it makes at the least (each way it reads
what is visible and writes everything) as a share of the speed of a plain copy. For the head also the peak of memory, as
the system counts it for a process of its own. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.ops.cross_entropy import linear_cross_entropy
from megalm.ops.native import instruction_set
from megalm.ops.softmax import Visibility, first_keys, fused_softmax
from megalm.train.device import DTYPES

SCALE = 0.125
TOKENS, WIDTH, VOCABULARY = 4096, 384, 32000


def best(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of each, in turn; the first round warms up."""
    times = [float("inf")] * len(functions)
    for round_ in range(rounds + 1):
        for number, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if round_:
                times[number] = min(times[number], time.perf_counter() - start)
    return times


def softmax_case(name: str, heads: int, length: int, document: int, dtype: torch.dtype, rounds: int) -> None:
    scores = torch.randn(1, heads, length, length).to(dtype).requires_grad_()
    grad = torch.randn(1, heads, length, length).to(dtype)
    ends = torch.arange(0, length + 1, document, dtype=torch.int32)
    first_key = first_keys(ends, 1)
    key = torch.arange(length)
    hidden = (key > key[:, None]) | (key < first_key[0, :, None])
    visible = Visibility(causal=True, first_key_BQ=None if document == length else first_key)

    def eager() -> None:
        p = torch.softmax((scores * SCALE).masked_fill(hidden, float("-inf")), -1)
        torch.autograd.grad(p, scores, grad)

    def ours() -> None:
        torch.autograd.grad(fused_softmax(scores, visible, SCALE), scores, grad)

    def ours_in_place() -> None:
        p = fused_softmax(scores, visible, SCALE, overwrites_gradient=True)
        torch.autograd.grad(p, scores, other)

    other, copy = grad.clone(), torch.empty_like(grad)
    times = best([eager, ours, ours_in_place, lambda: copy.copy_(grad)], rounds)
    seen = 1 - hidden.float().mean().item()
    least = (2 + 3 * seen) / 2 * times[3]  # two writes of all and three reads of what is visible; a copy is one of each
    words = [f"{label} {t * 1e3:7.1f} ms" for label, t in zip(("eager", "ours", "in place"), times, strict=False)]
    print(
        f"{name:28}", *words, f"ratio {times[0] / times[1]:.2f}, in place {times[0] / times[2]:.2f};"
        f" {least / times[2]:.0%} of copy speed", sep="  ",
    )  # fmt: skip


def head_step(kind: str, dtype: torch.dtype) -> Callable[[], object]:
    x = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    w = (torch.randn(VOCABULARY, WIDTH) * 0.02).requires_grad_()
    labels, counted = torch.randint(VOCABULARY, (TOKENS,)), torch.ones(TOKENS, dtype=torch.bool)

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(linear_cross_entropy(x, w, labels, counted)[0], (x, w))

    def whole() -> tuple[Tensor, ...]:
        loss = F.cross_entropy(F.linear(x, w.to(dtype)).float(), labels, reduction="sum")
        return torch.autograd.grad(loss, (x, w))

    def little() -> object:
        """What torch loads and keeps for such a step."""
        few, rows = x.detach()[:8].requires_grad_(), w.detach()[:64].requires_grad_()
        return torch.autograd.grad(linear_cross_entropy(few, rows, labels[:8] % 64, counted[:8])[0], (few, rows))

    return {"sliced": ours, "whole": whole, "little": little}[kind]


def peak_memory(kind: str, dtype: str) -> int:
    """Bytes at the peak of a process that runs one step."""
    command = [sys.executable, __file__, "--only", kind, "--dtype", dtype]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("sliced", "whole", "little"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtype = DTYPES[options.dtype]
    torch.set_num_threads(2)
    if options.only:
        head_step(options.only, dtype)()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    # First, as a child begins with the peak of the process that starts it.
    base, *peaks = (peak_memory(kind, options.dtype) for kind in ("little", "sliced", "whole"))
    print(f"{options.dtype}, native kernels: {instruction_set() or 'none'}")
    softmax_case("causal 1,024", 16, 1024, 1024, dtype, options.rounds)
    softmax_case("causal 4,096", 2, 4096, 4096, dtype, options.rounds)
    softmax_case("documents of 256 in 4,096", 2, 4096, 256, dtype, options.rounds)
    sliced, whole = best([head_step(kind, dtype) for kind in ("sliced", "whole")], options.rounds)
    memory = [(peak - base) / 2**20 for peak in peaks]
    print(f"head: sliced {sliced * 1e3:.0f} ms, {memory[0]:.0f} MiB; whole {whole * 1e3:.0f} ms, {memory[1]:.0f} MiB")
    print(f"      time {sliced / whole:.2f}, memory {memory[0] / memory[1]:.0%} of the whole")


if __name__ == "__main__":
    main()
