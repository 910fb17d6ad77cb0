"""Runs tasks in worker processes, each fed one task at a time through a pipe of its own.

    main --(number, task)-->  worker
         <--Progress--        now and then
         <--Done | exception--  at the task's end

A worker that is killed closes its pipe, which ends the command; a main process that is killed closes all of them, which
ends the workers. So nobody waits for the dead. Native code that runs for minutes hears no signal in Python: in a worker
it can be ended at any moment.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple, TypeVar

from megalm.errors import UserError

AHEAD = 4  # tasks a worker that may be done before the first that is waited for, where the order is kept

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[..., None]


class Progress(NamedTuple):
    values: tuple[Any, ...]


class Done(NamedTuple):
    number: int
    result: Any


def run_in_workers(
    make: Callable[[], Callable[[Task, Report], Result]],
    tasks: Iterable[tuple[int, Task]],
    workers: int,
    on_progress: Report = lambda *values: None,
    *,
    ahead: int | None = None,
    what: str = "a worker process",
    mend: str = "if memory is short, use fewer --workers",
) -> Generator[tuple[int, Result], None, None]:
    """The number and result of each numbered task, in the order in which they are done.

    `make` is called once in each worker and gives the function that does tasks; it is told a function that passes its
    arguments to `on_progress` here. `make`, tasks and results must be fit for pickling. With `ahead`, no task is begun
    that comes so many after one that is not done. An exception in a worker is raised here; a UserError says how `what`
    died. Closing the generator, or any exception in it, ends the workers first.
    """
    context = multiprocessing.get_context("spawn")  # a clean start: no locks or threads of this process
    waiting = iter(tasks)
    running: dict[Connection, SpawnProcess] = {}
    busy: dict[Connection, int] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, make), daemon=True)
            process.start()
            theirs.close()
            running[ours] = process
        idle, given = list(running), 0
        while True:
            while idle and (ahead is None or given < min(busy.values(), default=given) + ahead):
                if (task := next(waiting, None)) is None:
                    break
                with _watching(running[idle[-1]], what, mend):
                    idle[-1].send(task)
                busy[idle.pop()] = given
                given += 1
            if not busy:
                return
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                with _watching(running[pipe], what, mend):
                    message = pipe.recv()
                if isinstance(message, Progress):
                    on_progress(*message.values)
                elif isinstance(message, Done):
                    yield message
                    del busy[pipe]
                    idle.append(pipe)
                else:
                    raise message
    finally:
        for process in running.values():
            process.terminate()
        for pipe, process in running.items():
            process.join()
            pipe.close()


def map_in_order(
    make: Callable[[], Callable[[Task], Result]], tasks: Sequence[Task], workers: int
) -> Generator[Result, None, None]:
    """The result of each task, in the order of the tasks; one worker is this process. See `run_in_workers`."""
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(make(), tasks)
        return
    done: dict[int, Result] = {}
    wanted = 0
    results = run_in_workers(partial(_silent, make), enumerate(tasks), workers, ahead=AHEAD * workers)
    with closing(results):
        for number, result in results:
            done[number] = result
            while wanted in done:
                yield done.pop(wanted)
                wanted += 1


def _silent(make: Callable[[], Callable[[Any], Any]]) -> Callable[[Any, Report], Any]:
    """Makes a function of a task alone into one that is told how to report, and does not."""
    do = make()
    return lambda task, report: do(task)


class _watching:
    """Turns a broken pipe into the error that says how its worker died."""

    def __init__(self, process: SpawnProcess, what: str, mend: str) -> None:
        self._process, self._what, self._mend = process, what, mend

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, EOFError | OSError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise UserError(f"{self._what} {how}: {self._mend}") from None


def _work(pipe: Connection, make: Callable[[], Callable[[Any, Report], Any]]) -> None:
    """A worker's life: tasks in, progress and results out, until the main process closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends the workers
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            do = make()
            while True:
                number, task = pipe.recv()
                result = do(task, lambda *values: pipe.send(Progress(values)))
                pipe.send(Done(number, result))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except (UserError, OSError) as error:
            pipe.send(error)
        except Exception:  # of a class that may not survive the way: send what a reader needs
            pipe.send(RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
