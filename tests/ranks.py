"""Runs a function in several gloo ranks: `run_ranks(4, function, argument)` gives the four results.

    def halves(x: int) -> float: ...          # at module level, so that it can be pickled; the ranks import it
    assert run_ranks(2, halves, 3) == [1.5, 1.5]

Each call forks new processes from a server that has torch and megalm loaded, which takes a tenth of a second; torch
keeps too much of process groups that are over (threads, meshes in caches) for a process to serve two calls. A rank
that fails or hangs ends the call, and no process is left.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

T = TypeVar("T")
PRELOADED = ["torch", "torch.distributed", "torch.distributed.fsdp", "megalm.train.build", "megalm.train.trainer"]


class RankError(Exception):
    """What went wrong, of each rank that failed, the first one first; `failed` are their numbers in this order."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {error}" for rank, error in errors.items()))
        self.failed = list(errors)


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection


def run_ranks(size: int, function: Callable[..., T], *args: Any, timeout: float = 120.0, grace: float = 0.5) -> list[T]:
    """`function(*args)` in each of `size` gloo ranks; its results in the order of the ranks.

    Raises RankError when a rank raises, dies, or takes more than `timeout` seconds, which bounds every collective, too;
    after the first failure the others have `grace` seconds to end in their own way.
    """
    results: dict[int, T] = {}
    errors: dict[int, str] = {}
    died: set[int] = set()
    workers: list[_Worker] = []
    with TemporaryDirectory() as folder:
        try:
            job = pickle.dumps((function, args))
            workers += (_start(rank, size, folder, timeout, sys.path, job) for rank in range(size))
            deadline = time.monotonic() + timeout
            while len(results) + len(errors) < size and (left := deadline - time.monotonic()) > 0:
                waiting = {w.connection: r for r, w in enumerate(workers) if r not in results and r not in errors}
                for connection in wait(list(waiting), left):
                    rank = waiting[connection]  # type: ignore[index]
                    fine, value = _answer(workers[rank])
                    (results if fine else errors)[rank] = value
                    if fine is None:
                        died.add(rank)
                    if not fine:
                        deadline = min(deadline, time.monotonic() + grace)
            if not errors and len(results) < size:
                errors = _stacks(folder, workers, [rank for rank in range(size) if rank not in results], timeout)
        finally:
            for worker in workers:
                worker.process.kill()
            for worker in workers:
                worker.process.join()
                worker.connection.close()
    if errors:
        # Who died was first, whenever that was seen: the others failed for want of it.
        raise RankError(dict(sorted(errors.items(), key=lambda error: error[0] not in died)))
    return [results[rank] for rank in range(size)]


def _start(*args: Any) -> _Worker:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _answer(worker: _Worker) -> tuple[bool | None, Any]:
    """Whether the rank's function returned, or None if the process died; and the result or what went wrong."""
    try:
        fine, value = pickle.loads(worker.connection.recv_bytes())
    except (EOFError, ConnectionError):
        worker.process.join()
        return None, f"died with exit code {worker.process.exitcode}"
    return fine, value


def _stacks(folder: str, workers: list[_Worker], ranks: list[int], timeout: float) -> dict[int, str]:
    """Where each rank hangs."""
    for rank in ranks:
        with contextlib.suppress(TypeError, ProcessLookupError):
            os.kill(workers[rank].process.pid, signal.SIGUSR1)  # type: ignore[arg-type]
    time.sleep(0.3)
    return {
        rank: f"hangs after {timeout} s\n{path.read_text() if (path := Path(folder, f'stack-{rank}')).exists() else ''}"
        for rank in ranks
    }


def _serve(
    connection: Connection, rank: int, size: int, folder: str, timeout: float, path: list[str], job: bytes
) -> None:
    """A rank's process."""
    import torch

    torch.set_num_threads(1)
    sys.path[:] = path
    try:
        answer = True, _run(rank, size, folder, timeout, job)
        connection.send_bytes(pickle.dumps(answer))
    except BaseException:
        connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
    connection.close()
    os._exit(0)  # closes the sockets that the other ranks wait on, and leaves the rest to the system


def _run(rank: int, size: int, folder: str, timeout: float, job: bytes) -> Any:
    import torch
    import torch.distributed as dist

    from megalm.parallel.backend import backend

    with Path(folder, f"stack-{rank}").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        dist.init_process_group(
            backend(torch.device("cpu")),
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
        function, args = pickle.loads(job)
        value = function(*args)
        if dist.is_initialized():
            dist.barrier()  # a process that ends while a peer still talks to it fails that one, too
    return value
