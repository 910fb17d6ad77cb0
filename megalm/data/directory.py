"""A directory that is written whole or not at all: filled under a temporary name beside its own, renamed at the end."""

from __future__ import annotations

import glob
import os
import re
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megalm.errors import UserError
from megalm.files import sync_directory


@contextmanager
def new_directory(path: Path, owned: re.Pattern[str], overwrite: bool) -> Iterator[Path]:
    """Yields an empty temporary directory, which becomes `path` on success and is removed on failure or SIGTERM.

    `path` may be an empty directory. With `overwrite`, it may also hold files whose names match `owned`, which are
    replaced; nothing else is ever removed. Everything else is a `UserError` that names it.
    """
    final = Path(os.path.realpath(path))
    recover(final)
    check_output(path, owned, overwrite)
    made = make_parents(final.parent)
    _sweep(final)
    temporary = final.with_name(f"{_temporary(final)}{os.getpid()}")
    try:
        with exit_on_sigterm():
            temporary.mkdir()
            try:
                yield temporary
                sync_directory(temporary)
                put_in_place(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except BaseException as error:
        if isinstance(error, OSError) and str(error.filename or "").startswith(str(temporary)):
            error.filename = f"--output {path}"  # the name that the user knows
        remove_empty(made)
        raise


def _sweep(final: Path) -> None:
    """Removes what commands that were killed on this machine left beside `final`."""
    for left in final.parent.glob(f"{glob.escape(_temporary(final))}*"):
        number = left.name.rpartition("-")[2]
        if number.isdecimal() and not Path("/proc", number).exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)


def _temporary(final: Path) -> str:
    """What the names of temporary directories begin with; the number of a process says who is alive on its machine."""
    return f".{final.name}.tmp-{socket.gethostname()}-"


def check_output(path: Path, owned: re.Pattern[str], overwrite: bool) -> None:
    """A `UserError` unless `path` is free, an empty directory, or, with `overwrite`, of files that match `owned`."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"--output {path}: this is a file: choose another directory")
    names = sorted(os.listdir(path))
    foreign = [name for name in names if not owned.fullmatch(name)]
    if foreign:
        raise UserError(f"--output {path}: it holds other files ({foreign[0]}): choose a new or empty directory")
    if names and not overwrite:
        raise UserError(f"--output {path}: written already: choose another directory, or replace it with --overwrite")


def make_parents(parent: Path) -> list[Path]:
    """Makes `parent` and returns the directories that were missing, innermost first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
    return missing


def remove_empty(directories: Iterable[Path]) -> None:
    """Removes those of `directories` that are empty, in order."""
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


def put_in_place(new: Path, final: Path) -> None:
    """Renames `new` to `final`; what was there is replaced. If this is killed in between, `recover` mends it."""
    recover(final)
    old = _old(final)
    if final.exists():
        final.rename(old)
    try:
        new.rename(final)
    except BaseException:
        if old.exists():
            old.rename(final)
        raise
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(final: Path) -> None:
    """Puts back what `put_in_place` had moved away when it was killed, or removes it if it was replaced."""
    old = _old(final)
    if old.exists():
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """SIGTERM, as a batch system sends it, unwinds the stack like any failure, so that cleaning up is not left out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
