"""The collectives of one axis. On an axis of one rank each gives its input, and nothing is sent.

    start_gather        every rank's rows, in the order of the ranks         S rows each -> size * S rows
    start_scatter_sum   the sum over the ranks, this rank's rows of it       size * S rows -> S rows
    start_sum           the sum over the ranks, whole                        S rows -> S rows

They give a tensor at once, and `wait` says when it must be there; what stands between the two runs while it travels.
(torch's functional collectives: on NCCL and gloo alike, seen by its profiler, its debug modes and recomputation.)

gloo passes rows round a ring, and makes a scattered sum of a whole one. So on CPUs a gather and a scattered sum are
messages from each rank to each: no more bytes, half of them for the sum, and a fraction of the time (8 ranks on 2
cores, 8 KB each: 4 ms instead of 13 and 22; 4 ranks: 3 instead of 4 and 6).

The four of which autograd knows the derivative come in pairs, one the derivative of the other:

    gather_rows  <->  scatter_sum_rows           each_rank (the input, as it is)  <->  sum_ranks
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _register_work, _resolve_process_group
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName

from megalm.parallel.mesh import Axis


def start_gather(x: Tensor, axis: Axis) -> Tensor:
    if axis.group is None:
        return x
    if x.is_cpu:
        rows = [len(x)] * axis.size
        return torch.ops._c10d_functional.all_to_all_single(
            torch.cat([x] * axis.size), rows, rows, axis.group.group_name
        )
    return torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), axis.size, axis.group.group_name)


def start_scatter_sum(x: Tensor, axis: Axis) -> Tensor:
    if axis.group is None:
        return x
    if x.is_cpu:
        return torch.ops.megalm.scatter_sum(x, axis.size, axis.group.group_name)
    return torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", axis.size, axis.group.group_name)


def start_sum(x: Tensor, axis: Axis) -> Tensor:
    if axis.group is None:
        return x
    return torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", axis.group.group_name)


def wait(x: Tensor) -> Tensor:
    """`x` of a collective that was started; any other tensor is given as it is."""
    return torch.ops._c10d_functional.wait_tensor(x)


@torch.library.custom_op("megalm::scatter_sum", mutates_args=())
def scatter_sum(x: Tensor, size: int, group_name: str) -> Tensor:
    """`start_scatter_sum` by messages from each rank to each."""
    total = x.new_empty(len(x) // size, *x.shape[1:])
    _register_work(total, ScatteredSum(x.contiguous(), total, _resolve_process_group(GroupName(group_name))))
    return total


@scatter_sum.register_fake
def _(x: Tensor, size: int, group_name: str) -> Tensor:
    return x.new_empty(len(x) // size, *x.shape[1:])


class ScatteredSum(dist.Work):
    """Sends each rank its part of the contiguous `x`; `wait` adds up the parts that come, in `total`."""

    def __init__(self, x: Tensor, total: Tensor, group: ProcessGroup) -> None:
        super().__init__()
        self.arriving, self.total = torch.empty_like(x), total
        self.work = dist.all_to_all_single(self.arriving, x, group=group, async_op=True)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self.work.wait()
        torch.sum(self.arriving.view(-1, *self.total.shape), 0, out=self.total)
        return True


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


def _same(x: Tensor, axis: Axis) -> Tensor:
    return x.view_as(x)


class _Pair(torch.autograd.Function):
    """One collective forward, another backward."""

    @staticmethod
    def forward(ctx, x, axis, start, start_backward):  # type: ignore[no-untyped-def]
        ctx.axis, ctx.start_backward = axis, start_backward
        return wait(start(x, axis))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return wait(ctx.start_backward(grad, ctx.axis)), None, None, None
