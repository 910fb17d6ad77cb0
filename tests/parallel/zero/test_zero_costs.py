"""The formulas of memory and traffic against what is counted in a real step."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from zero_steps import MICRO_BATCHES, Case, build, data_mesh, run_step, sharded

from megalm.config.sections import Optimizer
from megalm.model.transformer import Transformer
from megalm.optim.adamw import build_adamw
from megalm.parallel.zero.costs import Memory, Traffic, memory, traffic

WIDE: dict[str, Any] = {"num_layers": 4, "hidden_size": 128, "num_heads": 2, "head_dim": 64, "ffn_size": 384}
OPS = {"_allgather_base_": "gather", "alltoall_base_": "scatter", "allreduce_": "sum"}


class Counter(TorchDispatchMode):
    """Every collective that is called, with the bytes of its larger buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
            self.calls.append((func._schema.name.split("::")[1], max(t.nbytes for t in flat)))
        return func(*args, **(kwargs or {}))


def units(model: Transformer) -> tuple[list[list[tuple[int, ...]]], list[tuple[int, ...]]]:
    blocks = [[tuple(p.shape) for p in block.parameters()] for block in model.layers.values()]
    return blocks, [tuple(p.shape) for n, p in model.named_parameters() if not n.startswith("layers.")]


def counted_traffic(case: Case) -> tuple[Traffic, set[str]]:
    mesh = data_mesh(case)
    model, queue, sync = sharded(case, mesh)
    run_step(case, model, queue, sync, mesh.data.rank, mesh.data.size)  # what is set up once
    with Counter() as counter:
        run_step(case, model, queue, sync, mesh.data.rank, mesh.data.size)
    found = []
    for op in OPS:
        sizes = [size for name, size in counter.calls if name == op]
        found += [len(sizes), sum(sizes)]
    return Traffic(*found), {name for name, _ in counter.calls} - set(OPS)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stage", "replicate"), [(0, 1), (1, 1), (2, 1), (3, 1), (1, 2), (3, 2)])
def test_a_step_sends_what_the_formula_says_and_nothing_else(stage: int, replicate: int, compute: torch.dtype) -> None:
    case = Case(stage, replicate, compute=compute, changes={"vocab_size": 38})
    blocks, root = units(build(case))
    layout = case.layout
    expected = traffic(blocks, root, stage, layout.data_shard, layout.data_replicate, MICRO_BATCHES, compute.itemsize)
    for found, others in run_ranks(layout.size, counted_traffic, case):
        assert not others
        assert found == expected


def live() -> int:
    """Bytes of all tensors that are alive: what Python sees, and the gradients of these."""
    seen = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    seen += [tensor.grad for tensor in seen if tensor.is_leaf and tensor.grad is not None]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in seen]
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in local)}.values())


def settled() -> int:
    """Bytes of all tensors that stay alive: the group's worker, in its own thread, may hold a message's buffers for a
    moment after it has told that they have arrived."""
    looks = []
    for _ in range(3):
        looks.append(live())
        time.sleep(0.02)
    return min(looks)


def counted_memory(case: Case) -> int:
    """The most that is alive in the middle of each block's forward pass in the second step; the optimizer has its state
    by then."""
    mesh = data_mesh(case)
    gc.collect()  # of the tests before
    before = live()
    model, queue, sync = sharded(case, mesh)
    optimizer = build_adamw(Optimizer(), list(model.named_parameters()))
    peaks: list[int] = []
    for step in range(2):
        for block in model.layers.values() if step == 1 else ():
            block.feed_forward.register_forward_pre_hook(lambda *_: peaks.append(settled() - before))
        run_step(case, model, queue, sync, mesh.data.rank, mesh.data.size)
        optimizer.step()
        optimizer.zero_grad()
    return max(peaks)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", range(4))
def test_a_rank_holds_what_the_formula_says(stage: int, compute: torch.dtype) -> None:
    case = Case(stage, compute=compute, changes=WIDE, length=4)
    blocks, root = units(build(case))
    expected: Memory = memory(blocks, root, stage, case.layout.data_shard, MICRO_BATCHES, compute.itemsize)
    for found in run_ranks(2, counted_memory, case):
        assert found == pytest.approx(expected.total, rel=0.02)
