"""Which part of a preparation one command does, when several on one file system work together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from megalm.errors import UserError


class Share(NamedTuple):
    """Units `rank`, `rank + world_size`, ... are this command's. `origin` says where that was read, if not given."""

    rank: int = 0
    world_size: int = 1
    origin: str = ""

    def has(self, unit: int) -> bool:
        return unit % self.world_size == self.rank


def find_share(rank: int | None, world_size: int | None, environment: Mapping[str, str] = os.environ) -> Share:
    """The share that was asked for, else what Slurm says: the task of a job array, of an `srun`, or of both."""
    if (rank is None) != (world_size is None):
        raise UserError("--rank and --world-size go together: give both or neither")
    if rank is not None and world_size is not None:
        if not 0 <= rank < world_size:
            raise UserError(f"--rank {rank} --world-size {world_size}: ranks are 0 to world size - 1")
        return Share(rank, world_size)
    share = Share()
    if count := _number(environment, "SLURM_ARRAY_TASK_COUNT"):
        task, first = (_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN"))
        step = _number(environment, "SLURM_ARRAY_TASK_STEP") or 1
        share = Share((task - first) // step, count, "SLURM_ARRAY_TASK_ID")
    # Only inside of an srun: a batch script itself is task 0 of as many as the job asked for, and runs once.
    if "SLURM_STEP_ID" in environment and (tasks := _number(environment, "SLURM_STEP_NUM_TASKS")):
        share = Share(
            share.rank * tasks + _number(environment, "SLURM_PROCID"), share.world_size * tasks, "SLURM_PROCID"
        )
    if not 0 <= share.rank < share.world_size:
        raise UserError(
            f"{share.origin}={environment[share.origin]}: not one of the {share.world_size} tasks that Slurm counts "
            "(an array with gaps?): give --rank and --world-size"
        )
    return share if share.world_size > 1 else Share()


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "0")
    if not text.isdecimal():
        raise UserError(f"{name}={text}: not a number: give --rank and --world-size")
    return int(text)
