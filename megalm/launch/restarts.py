"""Starting a run again after a failure: it goes on from its newest intact checkpoint, as any start does."""

from __future__ import annotations

import json
import math
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megalm.launch.slurm import SAVED

ASKED = {128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)}
TAIL = 1 << 20  # bytes in which a run's last metrics, and what its log says of its newest checkpoint, are found


def with_restarts(attempt: Callable[[], int], restarts: int, directory: Path, until: float = math.inf) -> int:
    """The exit code of the last `attempt`. After a failure it is made again, at most `restarts` times, but not after
    two failures at the same step, which the same start would only bring back, nor after a mistake of the user's (2) or
    a signal to end, nor from the time `until` on, in seconds since the epoch. `directory` is the run's."""
    failed_at = -1
    for number in range(1, restarts + 2):
        code = attempt()
        step = last_step(directory)
        if code in (0, 2) or code in ASKED or number > restarts:
            return code
        if time.time() >= until:
            print("megalm: failed, and run.time_limit is over: not started again", file=sys.stderr)
            return code
        if step == failed_at:
            print(f"megalm: failed twice at step {step}: not started again", file=sys.stderr)
            return code
        failed_at = step
        print(f"megalm: failed after step {step} (exit code {code}): restart {number} of {restarts}", file=sys.stderr)
    return code


def last_step(directory: Path) -> int:
    """The last step that a run's metrics, or its log of what was saved, tell of; 0 if there is none."""
    saved = re.findall(rf"{SAVED} (\d+)", _tail(directory / "train.log"))
    steps = [int(saved[-1]) if saved else 0]
    for line in reversed(_tail(directory / "metrics.jsonl").splitlines()):
        with suppress(ValueError, KeyError, TypeError):  # the end of a line, or half of one
            steps.append(int(json.loads(line)["step"]))
            break
    return max(steps)


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
