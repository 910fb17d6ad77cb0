from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
from runs import over

RANK = """
import os, time
from megalm.launch.lifeline import Lifeline
Lifeline(os.environ)
print("tied", flush=True)
time.sleep(100)
"""
PARENT = "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(100)"


def test_a_rank_ends_when_nobody_reads_what_it_says_any_more() -> None:
    pipe = subprocess.PIPE
    environment = {"CROSS_RANK": "0", "CROSS_SIZE": "2"}
    with subprocess.Popen(
        [sys.executable, "-c", RANK], stdout=pipe, stderr=pipe, env={**os.environ, **environment}
    ) as rank:
        assert rank.stdout is not None
        assert rank.stderr is not None
        assert rank.stdout.readline() == b"tied\n"
        rank.stdout.close()
        time.sleep(0.2)
        assert rank.poll() is None  # its errors are still heard
        rank.stderr.close()
        assert rank.wait(60) == -signal.SIGTERM


def test_a_rank_ends_with_a_launcher_that_waits_for_it_and_not_with_another_parent() -> None:
    for environment, ends in (({"TORCHELASTIC_RUN_ID": "x"}, True), ({"CROSS_RANK": "0"}, True), ({}, False)):
        command = [sys.executable, "-c", PARENT, sys.executable, "-c", RANK]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **environment}) as parent:
            assert parent.stdout is not None
            words = [parent.stdout.readline(), parent.stdout.readline()]
            rank = psutil.Process(int(next(word for word in words if word != b"tied\n")))
            parent.kill()
            deadline = time.monotonic() + 60
            while ends and not over(rank) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert over(rank) == ends
            if not ends:
                rank.kill()
