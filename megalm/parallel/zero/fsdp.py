"""Data parallelism with ZeRO's four stages (arXiv 1910.02054), by torch's FSDP2, for one stage of a pipeline.

    stage   whole on each data rank, during a step          gradients are reduced
    0       parameters, gradients, optimizer state          once a step
    1       parameters, gradients                           once a step
    2       parameters                                      after each micro-batch
    3       one block's parameters, and the next one's      after each micro-batch

Each block of the model is a unit that is gathered and reduced in one message; what is outside of the blocks is another.
On a hybrid mesh the units are sharded over `data_shard`; their gradients are summed over `data_replicate` once a step,
in stages 2 and 3 by hand: what FSDP keeps between the two sums must hold the same parameters each time, and does not
where a micro-batch's biases are reduced with one message and its weights with a later one.

FSDP's hooks reduce during the backward pass. They cannot where weight gradients come later, so there its end of a
backward pass is called by hand. Several forward passes may be in flight: what is gathered ahead is therefore told by
the order of the blocks, and not by what ran last, which is FSDP's own way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from megalm.config.sections import Zero
from megalm.parallel.collectives import start_joint_sum
from megalm.parallel.mesh import Axis, Mesh
from megalm.parallel.zero.direct import DirectSum
from megalm.parallel.zero.regions import local
from megalm.parallel.zero.sync import GradientSync, NoSync


def shard_stage(module: nn.Module, mesh: Mesh, zero: Zero, compute: torch.dtype) -> GradientSync:
    """Shards `module`, whose blocks are the children of `module.layers`, in place; one data rank leaves it as it is,
    except in a pipeline that computes in a narrower type: there FSDP keeps the one narrow copy of the weights that all
    micro-batches in flight use, where autograd would keep one for each.

    Its parameters become DTensors over `mesh.shards`; they may still be on the meta device. `compute` is the type in
    which they are gathered; gradients are reduced and added up in the parameters' own type, and are sums over the
    ranks. Stage 0 wants a mesh that only replicates.
    """
    dtype = next((parameter.dtype for parameter in module.parameters()), compute)
    narrow = compute if compute.itemsize < dtype.itemsize else None
    if mesh.shards is None or (mesh.data.size == 1 and narrow is None):
        return NoSync()
    stage = zero.stage if mesh.data.size > 1 else 1
    assert stage > 0 or mesh.data_shard.size == 1, "stage 0 shards nothing: the data ranks must all be replicas"
    policy = MixedPrecisionPolicy(narrow, dtype if narrow else None, cast_forward_inputs=False)
    # A CPU's parameters rest in its memory anyway, and there is nothing to pin them for.
    offload = CPUOffloadPolicy(pin_memory=mesh.device.type != "cpu") if zero.offload == "cpu" else OffloadPolicy()
    replicas = mesh.data_replicate if stage >= 2 else Axis()
    shards = mesh.shards if stage < 2 and mesh.data_replicate.size > 1 else mesh.shards["data_shard"]
    units = [*module.get_submodule("layers").children(), module]
    for unit in units:
        # The root is used at both ends of the forward pass, and soon again in the backward pass.
        reshard = stage == 3 and unit is not module
        fully_shard(unit, mesh=shards, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload)
    sharded = [unit for unit in units if isinstance(unit, FSDPModule)]
    _gather_ahead(sharded[-1], sharded[:-1])
    for unit in sharded:
        # A plain sum: the default would divide by the number of ranks.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        if mesh.device.type == "cpu":
            unit.set_custom_reduce_scatter(DirectSum())
    return FsdpSync(sharded[-1], units, stage, replicas, mesh.device)


def _gather_ahead(root: FSDPModule, blocks: Sequence[FSDPModule]) -> None:
    """While a unit computes, the next one of its pass is gathered."""
    for first, second in pairwise([root, *blocks]):
        first.set_modules_to_forward_prefetch([second])
    for first, second in pairwise([root, *reversed(blocks)]):
        first.set_modules_to_backward_prefetch([second])
    for unit in (root, *blocks):
        unit._set_unshard_async_op(True)


class FsdpSync:
    """The gradients of a module under FSDP; see `GradientSync`."""

    def __init__(
        self, root: FSDPModule, units: list[nn.Module], stage: int, replicas: Axis, device: torch.device
    ) -> None:
        """`units`: the blocks, then the root; `replicas`: over which FSDP itself does not sum."""
        self.root, self.units, self.stage, self.replicas, self.device = root, units, stage, replicas, device
        self.reduced = True
        self.summing: list[Callable[[], None]] = []
        self.mode: tuple[bool, bool, bool] | None = None

    def begin(self) -> None:
        self.reduced = False

    def before_backward(self, last: bool, deferred: bool) -> None:
        final = last and not deferred
        self._set(reduce=(self.stage >= 2 or last) and not deferred, final=final, free=self.stage == 3 or final)
        self.reduced = final

    def after_weights(self, last: bool) -> None:
        if self.stage >= 2 and not last:
            self._settle(final=False)
        else:
            self._collect()

    def reduce(self) -> None:
        if not self.reduced:
            self._settle(final=True)
            self.reduced = True
        if self.replicas.size > 1:
            self._sum_replicas()

    def finish(self) -> None:
        if not self.reduced:
            self._settle(final=True)  # forward passes alone: there is nothing to reduce, but what is whole to free
        for finish in self.summing:
            finish()
        self.summing.clear()

    def _sum_replicas(self) -> None:
        """One message for each unit, all of them on the way at once."""
        seen: set[nn.Parameter] = set()
        for unit in self.units:
            gradients = [local(p.grad) for p in unit.parameters() if p.grad is not None and p not in seen]
            seen.update(unit.parameters())
            if gradients:  # a middle stage has nothing outside of its blocks
                self.summing.append(start_joint_sum(gradients, self.replicas, self.device))

    def _collect(self) -> None:
        """Adds gradients in the type of computation to those in the type of reduction."""
        self._set(reduce=False, final=False, free=False)
        end_backward(self.root)

    def _settle(self, final: bool) -> None:
        """Reduces all gradients that are there."""
        self._collect()  # a unit's gradients must be of one type
        self._set(reduce=True, final=final, free=final)
        end_backward(self.root)

    def _set(self, reduce: bool, final: bool, free: bool) -> None:
        """Whether the next backward passes reduce at all, to the end (over replicas, too), and free what is whole."""
        if self.mode == (mode := (reduce, final, free)):
            return
        self.mode = mode
        self.root.set_requires_gradient_sync(reduce)
        self.root.set_requires_all_reduce(final)
        self.root.set_is_last_backward(final)
        self.root.set_reshard_after_backward(free)


def end_backward(root: FSDPModule) -> None:
    """What FSDP does at the end of a backward pass, for gradients that came after it: by a private name of torch's, as
    its own pipeline does for REDUCE_GRAD (torch/distributed/pipelining/stage.py)."""
    root._get_fsdp_state()._root_post_backward_final_callback()
