"""How much of the tensor ranks' communication is hidden behind their compute, on CPUs (gloo) or GPUs (NCCL).

    python tools/profile_communication.py --tensor 2                      # starts its ranks itself, on CPUs
    torchrun --nproc-per-node 8 tools/profile_communication.py --tensor 8 # one rank a GPU where there are GPUs

Runs steps of a small model under torch's profiler and prints rank 0's collectives: how many there are a step, how long
they take, how many block the compute and which share of their time does not. What a collective blocks is, on a GPU, the
time in which its kernel runs and no other does; on a CPU, the time in which the computing thread waits for it. (A rank
that waits for a slower one looks as if it communicated: read it on idle machines.)
"""

from __future__ import annotations

import argparse
import os
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megalm.config.sections import Model
from megalm.model.init import initialise
from megalm.model.transformer import ModelInputs, Transformer
from megalm.parallel.backend import backend
from megalm.parallel.mesh import Layout, build_mesh
from megalm.parallel.tensor.axis import TensorParallel
from megalm.train.device import DTYPES

Spans = list[tuple[float, float]]
BLOCKS = 0.1  # share of its time from which on a collective counts as blocking


def covered(span: tuple[float, float], by: Spans) -> float:
    """How long one of `by`, which do not overlap, runs during `span`."""
    return sum(max(0.0, min(span[1], last) - max(span[0], first)) for first, last in by)


def merged(spans: Spans) -> Spans:
    """The same time in spans that do not overlap."""
    union: Spans = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((start, end))
    return union


def report(profiler: profile, steps: int, cuda: bool) -> str:
    """What the profiler saw, in words."""
    collectives: dict[str, Spans] = {}
    others: Spans = []
    for event in profiler.events() or ():
        span = event.time_range.start, event.time_range.end
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device == cuda and event.name.startswith("ncclDevKernel_" if cuda else "gloo:"):
            collectives.setdefault(event.name.split("(")[0], []).append(span)
        elif on_device if cuda else event.name == "_c10d_functional::wait_tensor":
            others.append(span)
    others = merged(others)
    lines, all_times, all_exposed = [], [], []
    for name, spans in sorted(collectives.items()):
        times = [end - start for start, end in spans]
        beside = [covered(span, others) for span in spans]
        exposed = [time - shared for time, shared in zip(times, beside, strict=True)] if cuda else beside
        lines.append(line(name, times, exposed, steps))
        all_times += times
        all_exposed += exposed
    hidden = 1 - sum(all_exposed) / sum(all_times) if all_times else 1.0
    return "\n".join([*lines, f"{line('all', all_times, all_exposed, steps)}  hidden {hidden:.0%}"])


def line(name: str, times: list[float], exposed: list[float], steps: int) -> str:
    """Microseconds that each collective took, and those in which it blocked."""
    blocking = sum(wait > BLOCKS * time for time, wait in zip(times, exposed, strict=True))
    milliseconds = sum(times) / steps / 1e3
    return f"{name:36} {len(times) / steps:6.1f} a step {milliseconds:8.2f} ms  blocking {blocking / steps:.1f}"


def run(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    place = {} if rendezvous == "env://" else {"rank": rank, "world_size": options.tensor}
    dist.init_process_group(backend(device), init_method=rendezvous, **place)
    mesh = build_mesh(Layout(tensor=options.tensor), device, timedelta(minutes=5))
    config = Model(
        num_layers=options.layers, hidden_size=options.width, num_heads=8, num_kv_heads=8, head_dim=options.width // 8,
        ffn_size=4 * options.width, vocab_size=8192,
    )  # fmt: skip
    tp = TensorParallel(mesh.tensor, not options.whole_rows, options.overlap)
    model = Transformer(config, DTYPES[options.dtype], tp=tp).to(device)
    initialise(model, 0)
    tokens_T = torch.arange(options.tokens, device=device) * 31 % 8192
    ends = torch.tensor([0, options.tokens], dtype=torch.int32)
    inputs = ModelInputs(tokens_T, tokens_T.argsort(), ends, tokens_T.roll(-1), tokens_T >= 0)

    def step() -> None:
        model(inputs, scale=1 / options.tokens)[0].backward()
        model.zero_grad()

    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        for _ in range(options.steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    if mesh.rank == 0:
        print(report(profiler, options.steps, cuda), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor", type=int, default=2, help="tensor ranks, all of the world")
    parser.add_argument("--overlap", type=int, default=1, help="chunks of a gather")
    parser.add_argument("--whole-rows", action="store_true", help="without sequence sharding")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args()
    if "RANK" in os.environ:
        run(int(os.environ["RANK"]), options, "env://")
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(run, (options, f"file://{folder}/rendezvous"), options.tensor)


if __name__ == "__main__":
    main()
