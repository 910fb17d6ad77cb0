"""FSDP's sums on CPUs, from each rank to each instead of round gloo's ring; why and with what gain, see
`megalm.parallel.collectives`. (Gathers stay as they are: each to each they would hold a second copy of the whole.)"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from megalm.parallel.collectives import ScatteredSum


class DirectSum(ReduceScatter):
    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        assert op == dist.ReduceOp.SUM, "shard_stage asks for plain sums"
        assert not async_op, "FSDP waits for sums on a CPU"
        ScatteredSum(input_tensor, output_tensor, group).wait()
