"""Runs units of preparation in worker processes, each fed one unit at a time through a pipe of its own.

    main --(number, unit)-->  worker
         <--Progress--        now and then
         <--Done | exception--  at the unit's end

A worker that is killed closes its pipe, which ends the command; a main process that is killed closes all of them, which
ends the workers. So nobody waits for the dead.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import NamedTuple

from megalm.data.engine import open_engine
from megalm.data.locks import lock
from megalm.data.shards import Advance, Job, UnitResult, write_shard
from megalm.data.sources import Unit
from megalm.data.tokenizer import Tokenizer
from megalm.errors import UserError


class Setup(NamedTuple):
    """What a worker is given at its start. While it lives it shares `use_lock`, so that nobody takes its files for
    leftovers."""

    job: Job
    tokenizer: Tokenizer
    engine: str
    use_lock: Path


class Progress(NamedTuple):
    disk_bytes: int
    tokens: int


class Done(NamedTuple):
    number: int
    result: UnitResult


def run_in_workers(
    units: Iterable[tuple[int, Unit]], setup: Setup, workers: int, advance: Advance
) -> Generator[tuple[int, UnitResult], None, None]:
    """The number and result of each unit, in the order in which they are done.

    An exception in a worker is raised here. Closing the generator, or any exception in it, ends the workers first.
    """
    context = multiprocessing.get_context("spawn")  # a clean start: no locks or threads of this process
    waiting = iter(units)
    running: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, setup), daemon=True)
            process.start()
            theirs.close()
            running[ours] = process
        busy = [pipe for pipe in running if _give_next(pipe, waiting, running)]
        while busy:
            for pipe in wait(busy):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    raise _died(running[pipe]) from None
                if isinstance(message, Progress):
                    advance(*message)
                elif isinstance(message, Done):
                    yield message
                    if not _give_next(pipe, waiting, running):
                        busy.remove(pipe)
                else:
                    raise message
    finally:
        for process in running.values():
            process.terminate()
        for pipe, process in running.items():
            process.join()
            pipe.close()


def _give_next(pipe: Connection, waiting: Iterator[tuple[int, Unit]], running: dict[Connection, SpawnProcess]) -> bool:
    """Sends the next unit, if there is one."""
    task = next(waiting, None)
    if task is None:
        return False
    try:
        pipe.send(task)
    except OSError:
        raise _died(running[pipe]) from None
    return True


def _died(process: SpawnProcess) -> UserError:
    process.join()
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return UserError(f"a worker process {how}: if memory is short, use fewer --workers")


def _work(pipe: Connection, setup: Setup) -> None:
    """A worker's life, until the main process closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends the workers
    with suppress(EOFError, BrokenPipeError):
        try:
            _serve(pipe, setup)
        except (EOFError, BrokenPipeError):
            raise
        except (UserError, OSError) as error:
            pipe.send(error)
        except Exception:  # of a class that may not survive the way: send what a reader needs
            pipe.send(RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))


def _serve(pipe: Connection, setup: Setup) -> None:
    """Units in, progress and results out."""
    held = lock(setup.use_lock, shared=True, wait=False)
    if held is None:  # the main process was killed, and another command is starting
        return
    with held:
        encoder = open_engine(setup.engine, setup.tokenizer)
        while True:
            number, unit = pipe.recv()
            result = write_shard(number, unit, setup.job, encoder, lambda *done: pipe.send(Progress(*done)))
            pipe.send(Done(number, result))
