"""The cost of a split backward pass: input gradients (I) and then weight gradients (W) against the whole backward pass.

Both run on the same blocks and input, in turn in one process; prints the medians and the median of the ratios of
neighbours, and that of the backward pass of torch's own linear layers, which cannot be split.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from megalm.config.sections import Model
from megalm.model.transformer import Block, Context
from megalm.ops.attention import Segments
from megalm.parallel.tensor.axis import TensorParallel
from megalm.parallel.weight_gradients import WeightGradientQueue
from megalm.train.device import DTYPES

TOKENS, LENGTH = 1024, 512


def blocks(width: int, layers: int, tp: TensorParallel) -> nn.ModuleList:
    heads = width // 64
    config = Model(
        num_layers=layers, hidden_size=width, num_heads=heads, num_kv_heads=heads, head_dim=64, ffn_size=4 * width
    )
    stack = nn.ModuleList(Block(config, i, "none", tp) for i in range(layers))
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim == 2 else nn.init.ones_(parameter)
    return stack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    queue = WeightGradientQueue()
    stack = blocks(options.width, options.layers, TensorParallel(queue=queue))
    plain = blocks(options.width, options.layers, TensorParallel())
    x_TD = torch.randn(TOKENS, options.width, dtype=DTYPES[options.dtype], requires_grad=True)
    context = Context(Segments.of(torch.arange(0, TOKENS + 1, LENGTH, dtype=torch.int32), x_TD.device))

    def backward(stack: nn.ModuleList, run: Callable[[torch.Tensor], None]) -> float:
        y_TD = x_TD
        for block in stack:
            y_TD = block(y_TD, context)
        loss = y_TD.float().square().mean()
        stack.zero_grad()
        start = time.perf_counter()
        run(loss)
        return time.perf_counter() - start

    def split(loss: torch.Tensor) -> None:
        with queue.defer(0):
            loss.backward()
        queue.run(0)

    kinds = {
        "whole": lambda: backward(stack, torch.Tensor.backward),
        "split": lambda: backward(stack, split),
        "torch": lambda: backward(plain, torch.Tensor.backward),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for round_ in range(options.rounds + 1):
        for name, measure in kinds.items():
            seconds = measure()
            if round_:  # the first warms up
                times[name].append(seconds)
    for name, seconds_ in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds_, times["whole"], strict=True))
        middle, best = statistics.median(seconds_) * 1e3, min(seconds_) * 1e3
        print(f"{name:6} {middle:8.1f} ms, best {best:8.1f}  {ratio:.3f} of the whole")


if __name__ == "__main__":
    main()
