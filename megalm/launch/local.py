"""Starts the ranks of a run on this machine, through torch's elastic agent, which gives each its place in the
environment, watches them, and ends all when one fails."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

TO_END = "120"  # seconds that ranks have to end well, with a checkpoint, when the run is asked to stop


def start_local(processes: int, arguments: Sequence[str], module: str = "megalm.train") -> int:
    """Runs `python -m MODULE ARGUMENTS` in `processes` ranks; returns an exit code: 0, the first failed rank's,
    or 128 and the number of the signal that ended the run, or that rank."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TO_END)
    # As torchrun does: with several processes a machine, each would otherwise start a thread for each core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # Its words on each signal that it sends would stand around the one line that says what is wrong.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException as asked:
        return 128 + asked.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode  # it has said why
        ended = signal.Signals(-failure.exitcode)
        if ended not in (signal.SIGTERM, signal.SIGINT):  # after these a rank has saved, and said so
            print(f"megalm: error: rank {rank} (process {failure.pid}) was ended by {ended.name}", file=sys.stderr)
        return 128 + ended
    return 0
