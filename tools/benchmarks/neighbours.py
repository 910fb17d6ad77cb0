"""What stands beside the matrix products of a block: RMSNorm with the residual, SwiGLU and rotary positions.

Forward and backward, eager and through torch.compile, in turn in one run; and the least that a kernel of ours could
take, which is to move the bytes that have to be read and written once.

A kernel is worth its lines where it gains over eager and torch.compile does not. `run.compile` compiles whole blocks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.model.layers import RMSNorm
from megalm.ops.rotary import apply_rotary, rotary_frequencies, rotary_tables
from megalm.parallel.tensor.axis import TensorParallel
from megalm.train.device import DTYPES

Case = tuple[Callable[..., Tensor], tuple[Tensor, ...], int]
"""A function, its inputs, and how many times their bytes have to move: forward and backward."""


def cases(tokens: int, dtype: torch.dtype) -> dict[str, Case]:
    width, hidden, heads = 384, 1024, 6

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    norm = RMSNorm(TensorParallel(), width, 1e-5, partial=False)
    torch.nn.init.ones_(norm.weight)
    tables = rotary_tables(torch.arange(tokens), rotary_frequencies(64, 10000.0), dtype)
    # Of n bytes of input each: read all and write the result; read the result's gradient and what was kept, write all
    # gradients. x + y is both normed and handed on: 2 reads, 2 writes; then 3 reads, 1 write, of x's size.
    return {
        "residual and RMSNorm": (lambda x, y: norm(x + y) + (x + y), (random(tokens, width), random(tokens, width)), 4),
        "SwiGLU": (lambda gate, up: F.silu(gate) * up, (random(tokens, hidden), random(tokens, hidden)), 4),
        "rotary": (lambda x: apply_rotary(x, tables), (random(tokens, heads, 64),), 4),
    }


def both_ways(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    grad = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


def seconds(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    for name, (function, inputs, moves) in cases(options.tokens, DTYPES[options.dtype]).items():
        size = sum(x.numel() for x in inputs) * moves // 2  # a copy reads as much as it writes
        source = torch.randn(size, dtype=inputs[0].dtype)
        target = torch.empty_like(source)
        runs: dict[str, Callable[[], object]] = {
            "eager": both_ways(function, inputs),
            "compiled": both_ways(torch.compile(function), inputs),
            "bytes": partial(target.copy_, source),
        }
        times: dict[str, list[float]] = {kind: [] for kind in runs}
        for _ in range(options.rounds + 2):
            for kind, run in runs.items():
                times[kind].append(seconds(run, options.repeats))
        found = {kind: statistics.median(t[2:]) * 1e3 for kind, t in times.items()}
        print(
            f"{name:22} eager {found['eager']:7.2f} ms   compiled {found['compiled']:7.2f} ms "
            f"({found['eager'] / found['compiled']:.2f}x)   bytes alone {found['bytes']:6.2f} ms "
            f"(compiled takes {found['compiled'] / found['bytes']:.2f}x that)",
            flush=True,
        )


if __name__ == "__main__":
    main()
