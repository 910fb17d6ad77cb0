"""`python -m megalm.train CONFIG`: `megalm train` as launchers of processes start it, or `megalm doctor` with --doctor.

`megalm launch` adds `--job=FOLDER`.
"""

from __future__ import annotations

import os
import signal
import sys

from megalm.launch.job import mark_done, remove
from megalm.launch.lifeline import Lifeline
from megalm.launch.ranks import LOCAL_RANK

OTHERS = (*LOCAL_RANK, "--job=", "--doctor")


def rank() -> int:
    """What one rank of a launcher's does; returns the exit code."""
    job = next((word.removeprefix("--job=") for word in sys.argv[1:] if word.startswith("--job=")), "")
    launcher = Lifeline(os.environ, ours=bool(job))
    command = "doctor" if "--doctor" in sys.argv else "train"
    if command == "train":  # which hears them once it has read its config
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))

    from megalm.cli import main

    code = main([command, *(word for word in sys.argv[1:] if not word.startswith(OTHERS))])
    if job and os.environ.get("RANK") == "0":
        if not launcher.holds:
            remove(job)
        elif code == 0:
            mark_done(job)
    return code


if __name__ == "__main__":
    sys.exit(rank())
