"""Runs a function in several gloo ranks: `run_ranks(4, function, argument)` gives the four results.

    def halves(x: int) -> float: ...          # at module level, so that it can be pickled; the ranks import it
    assert run_ranks(2, halves, 3) == [1.5, 1.5]

The ranks' processes are forked from a server that has torch loaded, and stay for the next call, so that a call costs
milliseconds; each call has a process group of its own. A rank that fails or hangs ends the call, and its processes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

T = TypeVar("T")
PRELOADED = ["torch", "torch.distributed", "torch.distributed.fsdp", "megalm.model.transformer"]


class RankError(Exception):
    """What went wrong, of each rank that failed, the first one first; `failed` are their numbers in this order."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {error}" for rank, error in errors.items()))
        self.failed = list(errors)


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection


@dataclass
class _Pool:
    workers: list[_Worker] = field(default_factory=list)

    def take(self, size: int) -> list[_Worker]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        if not all(worker.process.is_alive() for worker in self.workers):
            self.close()  # something ended one between two calls
        while len(self.workers) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers.append(_Worker(process, ours))
        return self.workers[:size]

    def close(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.connection.close()
        self.workers.clear()


_POOL = _Pool()


def forget_ranks() -> None:
    """Lets the next call begin in new processes, for libraries that keep something of the one before."""
    _POOL.close()


def run_ranks(size: int, function: Callable[..., T], *args: Any, timeout: float = 120.0, grace: float = 0.5) -> list[T]:
    """`function(*args)` in each of `size` gloo ranks; its results in the order of the ranks.

    Raises RankError when a rank raises, dies, or takes more than `timeout` seconds, which bounds every collective, too;
    after the first failure the others have `grace` seconds to end in their own way.
    """
    workers = _POOL.take(size)
    results: dict[int, T] = {}
    errors: dict[int, str] = {}
    with TemporaryDirectory() as folder:
        job = pickle.dumps((function, args))
        for rank, worker in enumerate(workers):
            with contextlib.suppress(BrokenPipeError):  # dead since the last call: found below
                worker.connection.send((rank, size, folder, timeout, sys.path, job))
        deadline = time.monotonic() + timeout
        while len(results) + len(errors) < size and (left := deadline - time.monotonic()) > 0:
            waiting = {w.connection: r for r, w in enumerate(workers) if r not in results and r not in errors}
            answers = [_answer(rank := waiting[c], workers[rank]) for c in wait(list(waiting), left)]  # type: ignore[index]
            # Of those that are seen together, who died was first: the others failed for want of it.
            for rank, fine, value in sorted(answers, key=lambda answer: answer[1] is not None):
                (results if fine else errors)[rank] = value
                if not fine:
                    deadline = min(deadline, time.monotonic() + grace)
        if not errors and len(results) < size:
            errors = _stacks(folder, workers, [rank for rank in range(size) if rank not in results], timeout)
    if errors:
        _POOL.close()
        raise RankError(errors)
    return [results[rank] for rank in range(size)]


def _answer(rank: int, worker: _Worker) -> tuple[int, bool | None, Any]:
    """Whether the rank's function returned, or None if the process died; and the result or what went wrong."""
    try:
        fine, value = pickle.loads(worker.connection.recv_bytes())
    except (EOFError, ConnectionError):
        worker.process.join()
        return rank, None, f"died with exit code {worker.process.exitcode}"
    return rank, fine, value


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


def _serve(connection: Connection) -> None:
    """A rank's process: one job after the other, until the tests' process goes away."""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            rank, size, folder, timeout, path, job = connection.recv()
        except (EOFError, ConnectionError):
            return
        sys.path[:] = path
        try:
            value = _run(rank, size, folder, timeout, job)
            answer = pickle.dumps((True, value))
        except BaseException:
            connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
            connection.close()
            os._exit(1)  # closes the sockets that the other ranks wait on
        connection.send_bytes(answer)


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
            dist.barrier()  # a group that goes while a peer still uses it may end the process
            dist.destroy_process_group()
            gc.collect()  # groups in cycles keep their threads, which wake up a hundred times a second
        faulthandler.unregister(signal.SIGUSR1)
    return value
