"""Starts the ranks of a run on this machine, through torch's elastic agent, which gives each its place in the
environment, watches them, and ends all when one fails. The agent keeps the ranks' store, on this machine's loopback."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megalm.launch.lifeline import TO_END

LOOPBACK = "127.0.0.1"


class OneMachine(RendezvousHandler):
    """The agents' meeting where there is one. torch's own store listens on all networks, and what it finds there about
    other agents it unpickles, which is to run what anybody has written."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        listening = socket.create_server((LOOPBACK, 0))
        self._port = listening.getsockname()[1]
        self._store = dist.TCPStore(
            LOOPBACK, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )

    def get_backend(self) -> str:
        return "one-machine"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def start_local(processes: int, arguments: Sequence[str], module: str = "megalm.train") -> int:
    """Runs `python -m MODULE ARGUMENTS` in `processes` ranks; returns an exit code: 0, the first failed rank's,
    or 128 and the number of the signal that ended the run, or that rank."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(TO_END))
    # As torchrun does: with several processes a machine, each would otherwise start a thread for each core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # Its words on each signal that it sends would stand around the one line that says what is wrong.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    rendezvous_handler_registry.register("one-machine", OneMachine)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="megalm",
        rdzv_backend="one-machine",
        local_addr=LOOPBACK,
        max_restarts=0,  # that a run goes on from a checkpoint is decided elsewhere
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
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
