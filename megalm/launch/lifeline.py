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


class Lifeline:
    """Ties this rank to the launcher that `environment` tells of, and to `megalm launch` above it if it is `ours`."""

    def __init__(self, environment: Mapping[str, str], ours: bool = False) -> None:
        self._launcher = os.getppid()
        deepspeed = "CROSS_RANK" in environment
        on_hosts = environment.get("CROSS_SIZE", "1") != "1"
        # A broken pipe may be replaced by another file later.
        self._pipes = [os.dup(descriptor) for descriptor in (1, 2)] if deepspeed else []
        if deepspeed or "TORCHELASTIC_RUN_ID" in environment:
            end_with_parent()
        if deepspeed and (on_hosts or ours):
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def holds(self) -> bool:
        """Whether the launcher, DeepSpeed's, is there, and anybody may read what this process says."""
        return os.getppid() == self._launcher and not self._unheard(wait=False)

    def _unheard(self, wait: bool) -> bool:
        """Whether stdout and stderr are pipes that nobody reads; may `wait` for that."""
        for descriptor in self._pipes:
            poll = select.poll()
            poll.register(descriptor, 0)  # errors and the other end's going are always told
            if not poll.poll(None if wait else 0):
                return False
        return True

    def _watch(self) -> None:
        self._unheard(wait=True)
        os.kill(os.getpid(), signal.SIGTERM)
