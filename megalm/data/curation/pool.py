"""Runs tasks in worker processes and gives their results in the order of the tasks.

    main --(number, task)-->  worker          worker --(number, result) | exception-->  main

Each worker has a pipe of its own. A worker that is killed closes its pipe, which ends the command; a main process that
is killed closes all of them, which ends the workers.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from megalm.errors import UserError

AHEAD = 4  # tasks a worker that may be done before the first that is waited for

Task = TypeVar("Task")
Result = TypeVar("Result")


def map_in_order(
    make: Callable[[], Callable[[Task], Result]], tasks: Sequence[Task], workers: int
) -> Generator[Result, None, None]:
    """The result of each task. `make` is called once in each worker and gives the function that does tasks; it, tasks
    and results must be fit for pickling.

    One worker is this process. An exception in a worker is raised here; closing the generator ends the workers.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(make(), tasks)
        return
    context = multiprocessing.get_context("spawn")  # a clean start: no locks or threads of this process
    running: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, make), daemon=True)
            process.start()
            theirs.close()
            running[ours] = process
        idle, busy = list(running), set[Connection]()
        done: dict[int, Result] = {}
        given = wanted = 0
        while wanted < len(tasks):
            while idle and given < min(len(tasks), wanted + AHEAD * workers):
                pipe = idle.pop()
                with _watching(running[pipe]):
                    pipe.send((given, tasks[given]))
                busy.add(pipe)
                given += 1
            for ready in wait(busy):
                assert isinstance(ready, Connection)
                with _watching(running[ready]):
                    message = ready.recv()
                if isinstance(message, BaseException):
                    raise message
                done[message[0]] = message[1]
                busy.remove(ready)
                idle.append(ready)
            while wanted in done:
                yield done.pop(wanted)
                wanted += 1
    finally:
        for process in running.values():
            process.terminate()
        for pipe, process in running.items():
            process.join()
            pipe.close()


class _watching:
    """Turns a broken pipe into the error that says how its worker died."""

    def __init__(self, process: SpawnProcess) -> None:
        self._process = process

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, EOFError | OSError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise UserError(f"a worker process {how}: nothing was written: if memory is short, use fewer --workers")


def _work(pipe: Connection, make: Callable[[], Callable[[Any], Any]]) -> None:
    """A worker's life: tasks in, results out, until the main process closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends the workers
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            do = make()
        except Exception as error:
            pipe.recv()
            pipe.send(_portable(error))
            return
        while True:
            number, task = pipe.recv()
            try:
                message: Any = number, do(task)
            except Exception as error:
                message = _portable(error)
            pipe.send(message)


def _portable(error: Exception) -> Exception:
    """The error itself, or what a reader needs of one whose class may not survive the way."""
    if isinstance(error, UserError | OSError):
        return error
    return RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
