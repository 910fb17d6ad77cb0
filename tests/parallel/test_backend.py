"""The backend that a device's process groups are made with."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks

from megalm.parallel.backend import backend


def test_gpus_talk_by_nccl() -> None:
    assert backend(torch.device("cuda", 0)) == "nccl"


def settled_workers() -> int:
    """gloo's threads that run collectives."""
    time.sleep(0.2)  # a thread has its name a moment after it began
    names = Counter(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    return names["pt_gloo_runloop"]


def workers_of_new_groups() -> int:
    dist.barrier()
    before = settled_workers()
    groups = [dist.new_group([0, 1]) for _ in range(3)]
    sums = [torch.full((2,), float(dist.get_rank())) for _ in groups]
    for work in [dist.all_reduce(x, group=group, async_op=True) for x, group in zip(sums, groups, strict=True)]:
        work.wait()
    assert [x.tolist() for x in sums] == [[1.0, 1.0]] * 3
    return settled_workers() - before


def test_one_worker_runs_the_collectives_of_a_cpu_group() -> None:
    assert run_ranks(2, workers_of_new_groups) == [3, 3]


def group_through(interface: str) -> str:
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        dist.new_group([0, 1])
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]
    return interface


def test_gloo_listens_on_the_interface_that_the_environment_names() -> None:
    assert run_ranks(2, group_through, "lo") == ["lo", "lo"]
    with pytest.raises(RankError, match="nowhere0"):
        run_ranks(2, group_through, "nowhere0")
