"""The collectives of one axis. On an axis of one rank each gives its input, and nothing is sent.

    start_gather        every rank's rows, in the order of the ranks         S rows each -> size * S rows
    start_scatter_sum   the sum over the ranks, this rank's rows of it       size * S rows -> S rows
    start_sum           the sum over the ranks, whole                        S rows -> S rows

What they give is on its way until `wait`; what stands between the two runs while it travels.
(torch's functional collectives: on NCCL and gloo alike, seen by its profiler, its debug modes and recomputation.)

gloo passes rows round a ring, and makes a scattered sum of a whole one. So on CPUs a gather and a scattered sum are
messages from each rank to each: no more bytes, half of them for the sum, and a fraction of the time (8 ranks on 2
cores, 8 KB each: 4 ms instead of 13 and 22; 4 ranks: 3 instead of 4 and 6).

The four of which autograd knows the derivative come in pairs, one the derivative of the other:

    gather_rows  <->  scatter_sum_rows           each_rank (the input, as it is)  <->  sum_ranks
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.parallel.mesh import Axis


@dataclass(frozen=True)
class Started:
    """A collective on its way."""

    arriving: Tensor
    addends: int = 1
    """How many ranks' rows arrive, to be added up."""


def start_gather(x: Tensor, axis: Axis) -> Started:
    if axis.group is None:
        return Started(x)
    if x.is_cpu:
        return Started(_each_to_each(torch.cat([x] * axis.size), axis))
    return Started(torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), axis.size, axis.group.group_name))


def start_scatter_sum(x: Tensor, axis: Axis) -> Started:
    if axis.group is None:
        return Started(x)
    x = x.contiguous()
    if x.is_cpu:
        return Started(_each_to_each(x, axis), axis.size)
    return Started(torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", axis.size, axis.group.group_name))


def start_sum(x: Tensor, axis: Axis) -> Started:
    if axis.group is None:
        return Started(x)
    return Started(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", axis.group.group_name))


def wait(started: Started) -> Tensor:
    x = torch.ops._c10d_functional.wait_tensor(started.arriving)
    return x if started.addends == 1 else x.unflatten(0, (started.addends, -1)).sum(0)


def _each_to_each(x: Tensor, axis: Axis) -> Tensor:
    """The first rows of `x` to the first rank, the next ones to the next; theirs come in the order of the ranks."""
    assert axis.group is not None
    rows = [len(x) // axis.size] * axis.size
    return torch.ops._c10d_functional.all_to_all_single(x, rows, rows, axis.group.group_name)


def start_joint_sum(tensors: Sequence[Tensor], axis: Axis, device: torch.device) -> Callable[[], None]:
    """Adds up several tensors of one type over an axis of several ranks, in one message through `device`. What it gives
    waits for the sums and puts them in the tensors' place."""
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
    work = dist.all_reduce(flat, group=axis.group, async_op=True)

    def finish() -> None:
        work.wait()
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    return finish


def gather_rows(x: Tensor, axis: Axis) -> Tensor:
    """Every rank's rows; each rank's gradient of them is summed, and this rank's rows of the sum come back."""
    return x if axis.size == 1 else _Pair.apply(x, axis, start_gather, start_scatter_sum)


def scatter_sum_rows(x: Tensor, axis: Axis) -> Tensor:
    """This rank's rows of the sum over the ranks."""
    return x if axis.size == 1 else _Pair.apply(x, axis, start_scatter_sum, start_gather)


def sum_ranks(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the ranks, on each of them; its gradient is the same on each of them, too."""
    return x if axis.size == 1 else _Pair.apply(x, axis, start_sum, _same)


def each_rank(x: Tensor, axis: Axis) -> Tensor:
    """`x`, which is the same on each rank and used by each in its own way: the gradients are summed."""
    return x if axis.size == 1 else _Pair.apply(x, axis, _same, start_sum)


def _same(x: Tensor, axis: Axis) -> Started:
    return Started(x.view_as(x))


class _Pair(torch.autograd.Function):
    """One collective forward, another backward."""

    @staticmethod
    def forward(ctx, x, axis, start, start_backward):  # type: ignore[no-untyped-def]
        ctx.axis, ctx.start_backward = axis, start_backward
        return wait(start(x, axis))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return wait(ctx.start_backward(grad, ctx.axis)), None, None, None
