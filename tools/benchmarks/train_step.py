"""Training throughput against transformers: the same shapes, types and optimizer, in turn in one process.

Prints tokens/s, FLOP/s by 6 * parameters * tokens as a share of the measured square matrix product, and the ratio.
Where ours gains: attention by native kernels on the matrix units (or else by batched products over causal blocks), the
head sliced and differentiated in its forward pass, parameters cast once a micro-batch. Run it on an idle machine; the
best step of each counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch

try:
    import transformers
except ImportError:
    sys.exit("transformers is not installed: it comes with the test extra, which `make test` installs")

from megalm.config.sections import Model, Optimizer
from megalm.model.init import initialise
from megalm.model.transformer import ModelInputs, Transformer
from megalm.optim.build import build_optimizer
from megalm.optim.gradients import clip, totals
from megalm.parallel.zero.regions import regions
from megalm.train.device import DTYPES, measured_matmul
from megalm.train.passes import Passes

VOCAB, LENGTH, BATCH = 8192, 512, 8


def our_step(dtype: torch.dtype, tokens_BS: torch.Tensor, compiled: bool) -> tuple[Callable[[], None], int]:
    """What a run does in a step, its data aside."""
    shape = Model(
        num_layers=6,
        hidden_size=384,
        num_heads=6,
        num_kv_heads=6,
        head_dim=64,
        ffn_size=1024,
        vocab_size=VOCAB,
        max_positions=LENGTH,
    )
    model = Transformer(shape, dtype)
    initialise(model, 0)
    if compiled:
        for block in model.layers.values():
            block.compile()
    passes = Passes.of(model)
    held = regions(model, model.parts, passes.mesh)
    optimizer = build_optimizer(Optimizer(), held, passes.mesh)
    total = tokens_BS.numel()
    segments = torch.arange(0, total + 1, LENGTH, dtype=torch.int32)
    positions_T, tokens_T = torch.arange(LENGTH).repeat(BATCH), tokens_BS.flatten()
    counted_T = torch.ones(total, dtype=torch.bool)
    batch = ModelInputs(tokens_T, positions_T, segments, tokens_T.roll(-1), counted_T)

    def step() -> None:
        passes.run([batch], 1 / total)
        clip(held, totals(held, passes.mesh).norm, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in model.parameters())


def their_step(dtype: torch.dtype, tokens_BS: torch.Tensor) -> Callable[[], None]:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=6,
            hidden_size=384,
            num_attention_heads=6,
            num_key_value_heads=6,
            intermediate_size=1024,
            vocab_size=VOCAB,
            max_position_embeddings=LENGTH,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(tokens_BS, labels=tokens_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    options = parser.parse_args()
    dtype, cpu = DTYPES[options.dtype], torch.device("cpu")
    torch.set_num_threads(2)
    tokens_BS = torch.randint(VOCAB, (BATCH, LENGTH))
    ours, parameters = our_step(dtype, tokens_BS, options.compile)
    theirs = their_step(dtype, tokens_BS)
    ours(), theirs()
    best = [float("inf"), float("inf")]
    for _ in range(options.rounds):
        best = [min(best[0], seconds(ours)), min(best[1], seconds(theirs))]
    peak = measured_matmul(cpu, dtype)
    for name, time_ in zip(("megalm", "transformers"), best, strict=True):
        speed = tokens_BS.numel() / time_
        print(f"{name:13} {speed:7,.0f} tokens/s  {6 * parameters * speed / peak:.0%} of {peak / 1e9:.0f} GFLOP/s")
    print(f"ratio         {best[1] / best[0]:.2f}")


if __name__ == "__main__":
    main()
