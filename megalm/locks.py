"""Locks between processes, on one machine or several that share a file system: the kernel's, on a file.

A lock ends with the process that holds it, however that ends. Its file may be removed by who holds it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from megalm.errors import UserError


class NoLocks(UserError):
    """The file system has none."""


class Lock:
    """A lock that is held, until `release`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def is_in_place(self) -> bool:
        """Whether the file is still there, and no other took its place."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def change(self, shared: bool) -> bool:
        """Makes it shared or exclusive; False, and the lock may be lost, if others are in the way."""
        return _flock(self._path, self._descriptor, shared, wait=False)

    def release(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock(path: Path, shared: bool = False, wait: bool = True) -> Lock | None:
    """Locks the file `path`, made if it is missing; None if others hold it and this is not to `wait` for them.

    FileNotFoundError if the directory of `path` is missing, or was removed while this waited; NoLocks.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not _flock(path, descriptor, shared, wait):
                os.close(descriptor)
                return None
        except BaseException:
            os.close(descriptor)
            raise
        held = Lock(path, descriptor)
        if held.is_in_place():
            return held
        held.release()  # the file was removed meanwhile


def _flock(path: Path, descriptor: int, shared: bool, wait: bool) -> bool:
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise NoLocks(f"{path.parent}: its file system has no locks (flock): choose another") from None
        raise
    return True
