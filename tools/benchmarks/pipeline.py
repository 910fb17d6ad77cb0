"""The pipeline against torch.distributed.pipelining and DeepSpeed's PipelineModule: the same stages, data and schedules
over gloo, in turn in one run.

For each schedule: seconds a step; CPU time (user and system, all threads) a micro-batch and stage; and what of it is
over the bare forward and backward passes of the same stages. The stages are small, so that what is measured is what
the pipeline costs beside the compute.

Where ours gains: what can be known before the step is worked out once, so that an action is one call; a weight
gradient that waits is a function in a list, not a walk over the graph; receives wait in memory that is there; nothing
is sent about shapes. Messages themselves (gloo's threads and the kernel) are most of what is left.

What is left, by the profile: gloo's threads and the kernel, a third or more of the process's time and the same for
all; autograd's checks of what a backward pass begins with (20 µs); and where backward passes are split, linear layers
that are autograd functions in Python. The executor's own lines are a few µs an action.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining

from megalm.parallel.backend import backend
from megalm.parallel.mesh import Layout, Mesh, build_mesh
from megalm.parallel.pipeline.executor import Executor
from megalm.parallel.pipeline.p2p import warm_up
from megalm.parallel.pipeline.plan import Schedule, placement_of
from megalm.parallel.pipeline.planner import plan_schedule
from megalm.parallel.tensor.axis import TensorParallel
from megalm.parallel.tensor.linear import ColumnLinear, RowLinear, column
from megalm.parallel.weight_gradients import WeightGradientQueue
from megalm.parallel.zero.sync import NoSync

WIDTH, ROWS, BLOCKS = 64, 32, 2
SCHEDULES: dict[Schedule, tuple[int, str]] = {
    "gpipe": (1, "ScheduleGPipe"),
    "1f1b": (1, "Schedule1F1B"),
    "interleaved": (2, "ScheduleInterleaved1F1B"),
    "looped-bfs": (2, "ScheduleLoopedBFS"),
    "zb-h1": (1, "ScheduleInterleavedZeroBubble"),
    "interleaved-zb": (2, "ScheduleInterleavedZeroBubble"),
    "zbv": (2, "ScheduleZBVZeroBubble"),
    "dualpipev": (2, "ScheduleDualPipeV"),
}
Step = Callable[[], None]


class Block(nn.Module):
    """A feed-forward block of our linear layers; without a queue they are torch's own."""

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.norm = tp, nn.RMSNorm(WIDTH)
        self.up, self.down = ColumnLinear(tp, WIDTH, WIDTH, False), RowLinear(tp, WIDTH, WIDTH, False)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x_TD: Tensor) -> Tensor:
        (up_TD,) = column(self.norm(x_TD), [self.up], self.tp)
        return x_TD + self.down(F.gelu(up_TD))


def stage_module(tp: TensorParallel | None = None) -> nn.Module:
    return nn.Sequential(*(Block(tp or TensorParallel()) for _ in range(BLOCKS)))


@dataclass
class Figures:
    """Seconds a step, and CPU seconds of this rank in a step."""

    wall: float
    cpu: float


def measured(steps: dict[str, Step], rounds: int, repeats: int) -> dict[str, Figures]:
    """Medians over rounds in which each goes in turn."""
    walls: dict[str, list[float]] = {name: [] for name in steps}
    cpus: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                step()
            cpus[name].append((time.process_time() - cpu) / repeats)
            walls[name].append((time.perf_counter() - wall) / repeats)
    return {name: Figures(statistics.median(walls[name][1:]), statistics.median(cpus[name][1:])) for name in steps}


def our_step(schedule: Schedule, chunks: int, mesh: Mesh, x_MTD: Tensor, y_MTD: Tensor) -> Step:
    placement = placement_of(schedule, mesh.pipeline.size, chunks)
    actions = plan_schedule(schedule, mesh.pipeline.size, chunks, len(x_MTD))[mesh.pipeline.rank]
    queue = WeightGradientQueue() if any(str(action)[0] == "W" for action in actions) else None
    tp = TensorParallel(queue=queue)
    modules = {stage: stage_module(tp) for stage, rank in enumerate(placement) if rank == mesh.pipeline.rank}
    executor = Executor(actions, dict.fromkeys(modules, NoSync()), placement, mesh, queue)
    shapes = [tuple(x_MTD[0].shape)] * len(x_MTD)
    last = len(placement) - 1

    def forward(stage: int, micro_batch: int, x_TD: Tensor | None) -> Tensor:
        output = modules[stage](x_MTD[micro_batch] if x_TD is None else x_TD)
        return F.mse_loss(output, y_MTD[micro_batch]) if stage == last else output

    return lambda: executor.step(forward, shapes)


def torch_step(schedule: Schedule, chunks: int, mesh: Mesh, x_MTD: Tensor, y_MTD: Tensor) -> Step:
    placement = placement_of(schedule, mesh.pipeline.size, chunks)
    group = mesh.pipeline.group
    stages = [
        pipelining.PipelineStage(stage_module(), stage, len(placement), mesh.device, group=group)
        for stage, rank in enumerate(placement)
        if rank == mesh.pipeline.rank
    ]
    made = getattr(pipelining, SCHEDULES[schedule][1], None) or getattr(pipelining.schedules, SCHEDULES[schedule][1])
    whole = schedule in ("gpipe", "1f1b")
    runner = made(stages[0] if whole else stages, len(x_MTD), loss_fn=F.mse_loss, scale_grads=False)
    inputs = (x_MTD.flatten(0, 1),) if placement[0] == mesh.pipeline.rank else ()
    target = {"target": y_MTD.flatten(0, 1)} if placement[-1] == mesh.pipeline.rank else {}
    return lambda: runner.step(*inputs, **target)


def deepspeed_step(mesh: Mesh, x_MTD: Tensor, y_MTD: Tensor) -> Step:
    """One F1B step of DeepSpeed's. Raises ImportError if it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.pipe import LayerSpec, PipelineModule

    __compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first, for minutes
    deepspeed.init_distributed(dist_backend="gloo")
    layers = [LayerSpec(Block, TensorParallel()) for _ in range(BLOCKS * mesh.pipeline.size)]
    model = PipelineModule(layers, num_stages=mesh.pipeline.size, loss_fn=F.mse_loss, partition_method="uniform")
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": len(x_MTD),
        "steps_per_print": 1_000_000_000,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    pairs: Iterator[tuple[Tensor, Tensor]] = iter(zip(repeat(x_MTD[0]), repeat(y_MTD[0])))
    return lambda: engine.train_batch(pairs)


def bare_step(chunks: int, x_MTD: Tensor, y_MTD: Tensor) -> Step:
    """The same compute without a pipeline."""
    modules = [stage_module() for _ in range(chunks)]

    def step() -> None:
        for x_TD, y_TD in zip(x_MTD, y_MTD, strict=True):
            for module in modules:
                F.mse_loss(module(x_TD), y_TD).backward()

    return step


def rank_main(rank: int, options: argparse.Namespace, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group(
        backend(torch.device("cpu")), init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size
    )
    mesh = build_mesh(Layout(pipeline=size), torch.device("cpu"), timedelta(seconds=60))
    warm_up(mesh)
    x_MTD, y_MTD = torch.randn(2, options.micro_batches, ROWS, WIDTH)
    for schedule in options.schedules:
        chunks, _ = SCHEDULES[schedule]
        steps = {"bare": bare_step(chunks, x_MTD, y_MTD), "ours": our_step(schedule, chunks, mesh, x_MTD, y_MTD)}
        steps["torch"] = torch_step(schedule, chunks, mesh, x_MTD, y_MTD)
        if schedule == "1f1b" and options.deepspeed:
            steps["deepspeed"] = deepspeed_step(mesh, x_MTD, y_MTD)
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            figures = measured(steps, options.rounds, options.repeats)
        report(schedule, chunks, figures, mesh, options.micro_batches)
    dist.barrier()
    dist.destroy_process_group()


def report(schedule: str, chunks: int, figures: dict[str, Figures], mesh: Mesh, micro_batches: int) -> None:
    ranks: list[Any] = [None] * mesh.world.size
    dist.all_gather_object(ranks, figures)
    if mesh.rank != 0:
        return
    each = 1e6 / (micro_batches * chunks * mesh.world.size)
    cpu = {name: sum(rank[name].cpu for rank in ranks) * each for name in figures}
    over = {name: cpu[name] - cpu["bare"] for name in figures if name != "bare"}
    for name in over:
        wall = max(rank[name].wall for rank in ranks) * 1e3
        ratio = "" if name == "ours" else f"   overhead {over[name] / over['ours']:.2f}x ours"
        print(
            f"p={mesh.world.size} {schedule:15} {name:10} {wall:8.2f} ms/step {cpu[name]:7.0f} µs CPU "
            f"({over[name]:5.0f} over bare {cpu['bare']:.0f}) a micro-batch and stage{ratio}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20, help="steps a round")
    options = parser.parse_args()
    try:
        import deepspeed  # noqa: F401

        options.deepspeed = True
    except ImportError:
        options.deepspeed = False
        print("deepspeed is not installed: torch.distributed.pipelining only")
    for size in options.ranks:
        with TemporaryDirectory() as folder:
            mp.spawn(rank_main, (options, size, folder), nprocs=size)


if __name__ == "__main__":
    main()
