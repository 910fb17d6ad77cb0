from __future__ import annotations

import pytest

from megalm.data.share import Share, find_share
from megalm.errors import UserError

ARRAY = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_COUNT": "5", "SLURM_ARRAY_TASK_MIN": "10"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, (0, 1)),
        (ARRAY, (2, 5)),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "18", "SLURM_ARRAY_TASK_STEP": "2"}, (4, 5)),
        (STEP, (3, 4)),
        ({**ARRAY, **STEP}, (11, 20)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),  # a batch script, which runs once
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (0, 1)),
    ],
)
def test_slurm_says_which_share_is_this_commands(environment: dict[str, str], share: tuple[int, int]) -> None:
    assert find_share(None, None, environment)[:2] == share


def test_what_is_given_counts_more_than_what_slurm_says() -> None:
    assert find_share(1, 3, ARRAY) == Share(1, 3)
    assert find_share(0, 1, ARRAY) == Share()


def test_each_unit_is_in_one_share() -> None:
    for world_size in (1, 2, 7):
        shares = [Share(rank, world_size) for rank in range(world_size)]
        assert all(sum(share.has(unit) for share in shares) == 1 for unit in range(50))


@pytest.mark.parametrize(
    ("rank", "world_size", "environment", "reason"),
    [
        (0, None, {}, "--rank and --world-size go together"),
        (None, 2, {}, "--rank and --world-size go together"),
        (2, 2, {}, "--rank 2 --world-size 2: ranks are 0 to world size - 1"),
        (-1, 2, {}, "--rank -1"),
        (None, None, {**ARRAY, "SLURM_ARRAY_TASK_ID": "20"}, "SLURM_ARRAY_TASK_ID=20: not one of the 5 tasks"),
        (None, None, {**ARRAY, "SLURM_ARRAY_TASK_ID": "x"}, "SLURM_ARRAY_TASK_ID=x: not a number"),
    ],
)
def test_shares_that_cannot_be_are_refused(
    rank: int | None, world_size: int | None, environment: dict[str, str], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        find_share(rank, world_size, environment)
