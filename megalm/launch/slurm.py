"""`megalm launch --slurm`: a batch script for Slurm, made from the config and what the job asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """What a job asks Slurm for."""

    nodes: int
    gpus_per_node: int | None = None
    """Also the processes a node; without GPUs those are `processes_per_node`."""
    processes_per_node: int = 1
    time: str | None = None
    """At most so long, in one of Slurm's notations; None: the partition's default."""
    partition: str | None = None
    account: str | None = None
    container: str | None = None
    signal_before: int = 120
    """Seconds before the end at which the ranks are told to save."""


def launch_on_slurm(config: Path, overrides: Sequence[str], job: Job, dry_run: bool) -> int:
    """Submits a job that trains `config`, or with `dry_run` prints its batch script. Returns an exit code; raises
    UserError for what is wrong with the config or the job, or where there is no Slurm."""
    raise NotImplementedError
