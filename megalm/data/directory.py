"""A directory that is written whole or not at all: filled under a temporary name beside its own, renamed at the end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
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
    exists = _check(final, path, owned, overwrite)
    made = _make_parents(final.parent)
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    try:
        with _exit_on_sigterm():
            temporary.mkdir()
            try:
                yield temporary
                sync_directory(temporary)
                _rename(temporary, final, exists)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def _check(final: Path, shown: Path, owned: re.Pattern[str], overwrite: bool) -> bool:
    """Whether `final` exists, if it may be replaced."""
    if not final.exists():
        return False
    if not final.is_dir():
        raise UserError(f"--output {shown}: this is a file: choose another directory")
    names = sorted(os.listdir(final))
    foreign = [name for name in names if not owned.fullmatch(name)]
    if foreign:
        raise UserError(f"--output {shown}: it holds other files ({foreign[0]}): choose a new or empty directory")
    if names and not overwrite:
        raise UserError(f"--output {shown}: written already: choose another directory, or replace it with --overwrite")
    return True


def _make_parents(parent: Path) -> list[Path]:
    """Makes `parent` and returns the directories that were missing, innermost first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
    return missing


def _rename(temporary: Path, final: Path, exists: bool) -> None:
    if exists:
        old = final.with_name(f".{final.name}.old-{os.getpid()}")
        final.rename(old)
        try:
            temporary.rename(final)
        except BaseException:
            old.rename(final)
            raise
        shutil.rmtree(old)
    else:
        temporary.rename(final)
    sync_directory(final.parent)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM, as a batch system sends it, unwinds the stack like any failure, so that cleaning up is not left out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
