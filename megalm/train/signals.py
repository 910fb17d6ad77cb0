"""Asking a run to stop: a signal or the time limit ends it after the step under way, with a checkpoint.

SIGTERM, Ctrl-C     from a person, a launcher, or Slurm when a job is cancelled or has to give way
SIGUSR1             from Slurm before a job's time is over (sbatch --signal=USR1@120)
run.time_limit      by the clock, without anybody's signal:

    start                                                   time limit
    | ... step | evaluation | save | step ...     |   room    |
                                                  stops here: what was slowest so far still fits
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Literal

Work = Literal["step", "evaluation", "save"]


class StopRequest:
    """While entered, `received` is the signal that asked to stop, or None. A second Ctrl-C interrupts at once. The time
    limit counts from `started`, in seconds since the epoch, or else from now."""

    def __init__(self, started: float = 0) -> None:
        self.received: signal.Signals | None = None
        self.begun = time.monotonic() - (max(0.0, time.time() - started) if started else 0)
        self.limit = math.inf
        """Seconds after `begun` by which the run is to have ended."""
        self.slowest: dict[Work, float] = {"step": 0.0, "evaluation": 0.0, "save": 0.0}
        """Seconds of each kind of work, or what is expected of it before the first."""

    def __enter__(self) -> StopRequest:
        asking = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._former = {number: signal.signal(number, self._note) for number in asking}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, asking)  # a rank holds them back until it can hear them
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    @contextmanager
    def timed(self, work: Work) -> Iterator[None]:
        """Measures what is done inside."""
        begun = time.monotonic()
        yield
        self.slowest[work] = max(self.slowest[work], time.monotonic() - begun)

    @property
    def reason(self) -> str:
        """Why to stop after this step, empty if there is no reason. The next one could stop only after one more step,
        and this step's evaluation and save, if they are due, would come first."""
        if self.received:
            return self.received.name
        room = self.slowest["step"] + 2 * (self.slowest["evaluation"] + self.slowest["save"])
        return "run.time_limit" if time.monotonic() - self.begun + room > self.limit else ""


def in_seconds(limit: float | str | None) -> float:
    """A time limit, `H:MM:SS` or seconds; None is never."""
    if isinstance(limit, str):
        hours, minutes, seconds = map(int, limit.split(":"))
        return 3600 * hours + 60 * minutes + seconds
    return math.inf if limit is None else limit
