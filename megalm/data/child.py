"""Runs one function in a process of its own, so that a signal ends it at once and a crash is one line.

Native code that runs for minutes hears no signal in Python; its process can be killed at any moment.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from megalm.errors import UserError

Report = Callable[..., None]


class _Progress(NamedTuple):
    values: tuple[Any, ...]


class _Result(NamedTuple):
    value: Any


def call_in_child(function: Callable[..., Any], arguments: tuple[Any, ...], on_progress: Report, what: str) -> Any:
    """`function(*arguments, report)` computed in a new process; what it reports is told to `on_progress`.

    An exception there is raised here. If the process dies, a UserError says that `what` did.
    """
    context = multiprocessing.get_context("spawn")  # a clean start: no locks or threads of this process
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            message = ours.recv()
            if isinstance(message, _Progress):
                on_progress(*message.values)
            elif isinstance(message, _Result):
                return message.value
            else:
                raise message
    except EOFError:
        process.join()
        raise UserError(f"{what} {how_it_ended(process.exitcode)}: is memory short?") from None
    finally:
        process.kill()
        process.join()
        ours.close()


def how_it_ended(exit_code: int | None) -> str:
    """`was killed by SIGKILL` or `ended with exit code 3`."""
    code = exit_code or 0
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _work(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    try:
        pipe.send(_Result(function(*arguments, lambda *values: pipe.send(_Progress(values)))))
    except (UserError, OSError) as error:
        pipe.send(error)
    except Exception:  # of a class that may not survive the way: send what a reader needs
        pipe.send(RuntimeError(f"in a process for {function.__name__}:\n{traceback.format_exc()}"))
