"""Attention forward and backward: the native kernels against torch's flash attention and against our batched products
over blocks, on the same numbers, in turn in one process.

Shapes are segments × tokens, heads and head dim; all causal. Prints each one's best times and the ratios of forward and
backward together. `--cpu-time` counts a single thread's time on its core instead, which other load on the machine
changes less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalm import _attention
from megalm.ops.attention import blocked_attention
from megalm.train.device import DTYPES

SHAPES = [(8, 512, 6, 64), (1, 4096, 6, 64)]  # a layer of the 17-million-parameter Llama of train_step.py; a long text

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its CPU time")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu_time else 2)
    now = time.thread_time if options.cpu_time else time.perf_counter
    dtype = DTYPES[options.dtype]
    names = _attention.kernels(bfloat16=dtype == torch.bfloat16)
    for segments, length, heads, head_dim in SHAPES:
        ends = torch.arange(0, segments * length + 1, length, dtype=torch.int32)
        by_token = [torch.randn(segments * length, heads, head_dim, dtype=dtype) for _ in range(4)]
        by_head = [x.view(segments, length, heads, head_dim).transpose(1, 2).contiguous() for x in by_token]

        def native(name: str, ends: Tensor = ends) -> Attend:
            return lambda q, k, v: torch.ops.megalm.cpu_attention(q, k, v, ends, 0, 0.0, name)[0]

        def blocks(q: Tensor, k: Tensor, v: Tensor, ends: Tensor = ends) -> Tensor:
            return blocked_attention(q, k, v, ends, 0, 0.0)

        def seconds(attend: Attend, inputs: list[Tensor]) -> tuple[float, float]:
            *qkv, grad = (x.detach().requires_grad_() for x in inputs)
            start = now()
            out = attend(*qkv)
            middle = now()
            torch.autograd.grad(out, qkv, grad)
            return middle - start, now() - middle

        kinds: dict[str, tuple[Attend, list[Tensor]]] = {"torch flash": (flash, by_head), "blocks": (blocks, by_token)}
        kinds |= {name: (native(name), by_token) for name in names}
        best = dict.fromkeys(kinds, (float("inf"), float("inf")))
        for _round in range(options.rounds):
            for name, (attend, inputs) in kinds.items():
                forward, backward = seconds(attend, inputs)
                best[name] = min(best[name][0], forward), min(best[name][1], backward)
        print(f"{segments} x {length} tokens, {heads} heads of {head_dim}, {options.dtype}")
        operations = 2 * segments * length**2 * heads * head_dim  # of a causal forward pass; 2.5 times that backward
        for name, (forward, backward) in best.items():
            speed = 3.5 * operations / (forward + backward) / 1e9
            print(
                f"  {name:13} {forward * 1e3:7.1f} ms forward {backward * 1e3:7.1f} ms backward {speed:5.0f} GFLOP/s"
                f"   torch flash / this {sum(best['torch flash']) / (forward + backward):5.2f}"
                f"   blocks / this {sum(best['blocks']) / (forward + backward):5.2f}"
            )


if __name__ == "__main__":
    main()
