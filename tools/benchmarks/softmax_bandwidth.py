"""Bandwidth of the native softmax and cross-entropy kernels, against a copy within the same device, in turn in one run.

For each kernel: the bytes that it moves at the least (what is visible is read, results are written whole), per second,
and that as a share of what a copy of a large tensor reaches (its bytes read and written counted). On a GPU, or on the
CPU with --device cpu; on an idle machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megalm.ops import native
from megalm.ops.softmax import Settings, with_mask

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Kernel(NamedTuple):
    name: str
    num_bytes: float
    run: Callable[[], object]


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of one call, the mean of `repeats` without a pause between them."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_event.record()
    for _ in range(repeats):
        run()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3 / repeats


def softmax_kernels(elements: int, keys: int, dtype: torch.dtype, causal: bool, device: torch.device) -> list[Kernel]:
    """Both passes over square scores of `keys` keys, or where there is no mask over rows of that length."""
    queries = min(keys, elements // keys) if causal else max(1, min(1024, elements // keys))
    heads = max(1, elements // keys // queries)
    scores = torch.randn(1, heads, queries, keys, device=device, dtype=dtype)
    grad, p, grad_scores = torch.randn_like(scores), torch.empty_like(scores), torch.empty_like(scores)
    settings = Settings(causal=causal, scale=0.125)
    # Of `queries` rows the last sees all keys, each other one fewer than the next.
    seen = (keys - (queries - 1) / 2) / keys if causal else 1.0
    size = scores.numel() * scores.element_size()
    label = f"{keys} keys{', causal' if causal else ''}"
    none = (None, None, None)

    def forward() -> None:
        with_mask("megalm_softmax_forward", scores, settings, scores, p, *none)

    def backward() -> None:
        with_mask("megalm_softmax_backward", scores, settings, grad, p, None, None, grad_scores, None)

    return [
        Kernel(f"softmax forward, {label}", size * (seen + 1), forward),
        Kernel(f"softmax backward, {label}", size * (2 * seen + 1), backward),
    ]


def cross_entropy_kernels(elements: int, words: int, dtype: torch.dtype, device: torch.device) -> list[Kernel]:
    rows = max(1, elements // words)
    logits = torch.randn(rows, words, device=device, dtype=dtype)
    grad = torch.empty_like(logits)
    targets = torch.randint(words, (rows,), device=device)
    of_rows = [torch.empty(rows, device=device) for _ in range(3)]
    lse, weight = logits.float().logsumexp(1), torch.ones(rows, device=device)
    shape = (rows, words, native.DTYPES[dtype])
    size = logits.numel() * logits.element_size()

    def statistics() -> None:
        native.call("megalm_cross_entropy_statistics", logits, *shape, logits, targets, 0.0, *of_rows, None)

    def gradient() -> None:
        tensors: tuple[Tensor, ...] = (logits, targets, lse, weight)
        native.call("megalm_cross_entropy_backward", logits, *shape, *tensors, 0.0, 0.0, 1.0, 0.0, grad)

    return [
        Kernel(f"cross-entropy statistics, {words} words", size, statistics),
        Kernel(f"cross-entropy gradient, {words} words", 2 * size, gradient),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1 or cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--elements", type=int, default=1 << 28, help="of each tensor")
    parser.add_argument("--keys", type=int, nargs="+", default=[256, 512, 1000, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--words", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("softmax_bandwidth.py: there is no GPU: --device cpu measures the CPU's kernels")
    if native.library("cuda" if device.type == "cuda" else "cpu") is None:
        sys.exit(f"softmax_bandwidth.py: the kernels for {device.type} are not built (see `megalm env`)")
    dtype = DTYPES[args.dtype]
    source = torch.randn(args.elements, device=device).to(dtype)
    copy = torch.empty_like(source)

    def measure(kernel: Kernel) -> tuple[float, float]:
        """Bytes per second of the kernel and, measured beside it, of a copy."""
        speeds = []
        for num_bytes, run in ((kernel.num_bytes, kernel.run), (2 * copy.nbytes, lambda: copy.copy_(source))):
            seconds(run, device, 2)
            speeds.append(num_bytes / seconds(run, device, args.repeats))
        return speeds[0], speeds[1]

    print(f"{args.dtype}, {args.elements:,} elements, {device}")
    shapes = [(keys, causal) for keys in args.keys for causal in (False, True)]
    for make in [
        *(lambda k=keys, c=causal: softmax_kernels(args.elements, k, dtype, c, device) for keys, causal in shapes),
        *(lambda w=words: cross_entropy_kernels(args.elements, w, dtype, device) for words in args.words),
    ]:
        for kernel in make():
            speed, of_copy = measure(kernel)
            print(f"{kernel.name:44}{speed / 1e9:9.1f} GB/s{speed / of_copy:7.0%} of a copy", flush=True)


if __name__ == "__main__":
    main()
