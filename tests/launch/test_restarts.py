from __future__ import annotations

import time
from pathlib import Path

import pytest

from megalm.launch.ranks import STARTED, who_am_i
from megalm.launch.restarts import last_step, with_restarts
from megalm.train.signals import StopRequest


@pytest.mark.parametrize(
    ("ends", "restarts", "code", "attempts"),
    [
        ([(3, 137), (9, 1), (20, 0)], 2, 0, 3),
        ([(3, 137), (9, 1), (12, 137), (20, 0)], 2, 137, 3),
        ([(3, 137), (3, 1), (20, 0)], 9, 1, 2),  # twice at one step
        ([(0, 1), (0, 1), (20, 0)], 9, 1, 2),
        ([(3, 2), (20, 0)], 9, 2, 1),  # the user's mistake
        ([(3, 143), (20, 0)], 9, 143, 1),  # asked to end
        ([(3, 137), (20, 0)], 0, 137, 1),
    ],
)
def test_a_run_starts_again_as_often_as_it_may_and_while_it_gets_further(
    tmp_path: Path, ends: list[tuple[int, int]], restarts: int, code: int, attempts: int
) -> None:
    made = []

    def attempt() -> int:
        step, result = ends[len(made)]
        made.append(step)
        if step:
            (tmp_path / "metrics.jsonl").write_text(f'{{"step":{step},"loss":1.0}}\n{{"step":{step + 1},"lo')
        return result

    assert (with_restarts(attempt, restarts, tmp_path), len(made)) == (code, attempts)


def test_the_last_step_is_that_of_the_last_whole_line(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step":{step}}}\n' for step in range(20_000)) + '{"st')
    assert last_step(tmp_path) == 19_999
    log = "".join(f"now saved the checkpoint of step {step}, there\n" for step in (20_000, 20_500))
    (tmp_path / "train.log").write_text(log)
    assert last_step(tmp_path) == 20_500, "steps are logged less often than saved"


def test_a_run_whose_time_is_over_does_not_start_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[int] = []
    assert with_restarts(lambda: made.append(1) or 1, 9, tmp_path, until=time.time() - 1) == 1
    assert len(made) == 1
    assert "run.time_limit is over" in capsys.readouterr().err


def test_the_time_limit_of_a_run_that_started_again_counts_from_the_first_start() -> None:
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    process = who_am_i({**told, STARTED: str(int(time.time()) - 500)})
    stop, anew = StopRequest(process.started), StopRequest(who_am_i(told).started)
    stop.limit = anew.limit = 400
    assert (stop.reason, anew.reason) == ("run.time_limit", "")
