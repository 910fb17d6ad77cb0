from __future__ import annotations

import math
import os
import signal
import time

import pytest

from megalm.train.signals import StopRequest, in_seconds


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_handlers_from_before_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received is number
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_at_once_and_a_second_sigterm_does_not() -> None:
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_time_limit_leaves_room_for_what_was_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = StopRequest()
    stop.limit = in_seconds("0:01:40")
    for work, seconds in (("step", 5.0), ("step", 3.0), ("evaluation", 7.0), ("save", 4.0)):
        with stop.timed(work):
            now += seconds
    room = 5 + 2 * (7 + 4)
    now = 100.0 - room
    assert not stop.reason
    now += 0.001
    assert stop.reason == "run.time_limit"
    assert in_seconds(None) == math.inf
    assert in_seconds(90) == 90
