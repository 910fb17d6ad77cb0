from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks


def rank_and_sum(factor: int) -> tuple[int, int]:
    total = torch.tensor(dist.get_rank() * factor)
    dist.all_reduce(total)
    return os.getpid(), int(total)


def fails_at_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no two is three")
    dist.barrier()


def dies_at_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hangs_at_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.barrier()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ranks_work_together_in_processes_of_their_own() -> None:
    first, second = run_ranks(3, rank_and_sum, 5), run_ranks(2, rank_and_sum, 1)
    assert [total for _, total in first] == [15, 15, 15]
    assert [total for _, total in second] == [1, 1]
    pids = {pid for pid, _ in first + second}
    assert len(pids) == 5
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize(
    ("function", "words"), [(fails_at_one, "no two is three"), (dies_at_one, "exit code -9")], ids=["raises", "dies"]
)
def test_the_rank_that_fails_first_is_named_and_no_process_is_left(function: object, words: str) -> None:
    with pytest.raises(RankError, match=words) as error:
        run_ranks(3, function)  # type: ignore[arg-type]
    assert error.value.failed[0] == 1
    assert [left for server in psutil.Process().children() for left in server.children()] == []


def test_a_rank_that_hangs_is_named_with_its_stack() -> None:
    with pytest.raises(RankError, match=r"rank 1: hangs after 2.0 s[\s\S]*hangs_at_one"):
        run_ranks(2, hangs_at_one, timeout=2.0)
