"""A rank ends with its launcher: what else would it run for, unheard, on a host that others want?

    launcher on this host dies       the system sends SIGTERM (PR_SET_PDEATHSIG), which stops a run well
    connection to the launcher ends  nobody reads what the rank says any more: the same

torch's agent and DeepSpeed's launcher wait for their ranks, so that their death is an accident; a shell that has
started ranks by hand may leave them alone.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Mapping

PR_SET_PDEATHSIG = 1
TO_END = 120  # seconds that ranks have to end well, with a checkpoint, when the run is asked to stop


def end_with_parent() -> None:
    """From now on this process is sent SIGTERM when its parent dies; where the system can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with_launcher(environment: Mapping[str, str]) -> None:
    """Ties this rank to the launcher that `environment` tells of."""
    on_hosts = environment.get("CROSS_SIZE", "1") != "1"  # DeepSpeed's, over several hosts
    if "TORCHELASTIC_RUN_ID" in environment or "CROSS_RANK" in environment:
        end_with_parent()
    if on_hosts and "CROSS_RANK" in environment:
        threading.Thread(target=_watch, daemon=True).start()


def is_heard(wait: bool = False) -> bool:
    """Whether anybody may read what this process says; may `wait` until stdout and stderr are pipes that nobody reads,
    and then says no."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)  # errors and the other end's going are always told
        if not poll.poll(None if wait else 0):
            return True
    return False


def _watch() -> None:
    is_heard(wait=True)
    os.kill(os.getpid(), signal.SIGTERM)
