"""Where checkpoints lie: in a directory, or wherever fsspec gets by a URL.

    place("runs/a/checkpoints")        a Path
    place("s3://bucket/runs/a")        a Remote, which has those methods of a Path that checkpoints need

A Remote's files are whole when their writer closes them and not before; nothing in it can be renamed.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megalm.errors import UserError

SENT_AT_ONCE = 8 << 20  # bytes


@dataclass(frozen=True)
class Remote:
    files: Any
    """An fsspec file system."""
    path: str

    def __str__(self) -> str:
        return str(self.files.unstrip_protocol(self.path))

    def __truediv__(self, name: str) -> Remote:
        return Remote(self.files, f"{self.path.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    def ask(self, method: str, *args: Any, **options: Any) -> Any:
        """What a method of the file system gives for this path; all of its kinds of failure are OSErrors."""
        with _failures():
            return getattr(self.files, method)(self.path, *args, **options)

    def sizes(self) -> dict[str, int]:
        self.files.invalidate_cache()
        found = self.ask("ls", detail=True)
        own = self.path.strip("/")  # some stores list a directory's own marker
        entries = [(entry["name"].strip("/"), entry) for entry in found if entry["name"].strip("/") != own]
        return {name.rpartition("/")[2]: entry["size"] if entry["type"] == "file" else -1 for name, entry in entries}


Place = Path | Remote
Reader = Callable[[int, memoryview], int]
"""Reads from a position into memory; gives how many bytes there were."""


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.strerror:
            raise
        number = errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EIO
        raise OSError(number, f"{type(error).__name__}: {error}") from error
    except Exception as error:  # a file system's own
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def place(text: str, key: str = "") -> Place:
    """What a path or a URL names; `key` is the setting that it comes from. Raises UserError for an unknown protocol."""
    protocol, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if protocol in ("file", "local"):
        return Path(rest)
    from fsspec.core import url_to_fs  # fsspec is slow to import, and few need it

    try:
        files, path = url_to_fs(text)
    except (ValueError, ImportError, OSError) as error:
        raise UserError(f"{key and f'{key}='}{text}: {error}") from error
    return Remote(files, path)


def names(directory: Place) -> list[str]:
    """Of what is in it; none if it is missing."""
    try:
        return list(directory.sizes()) if isinstance(directory, Remote) else os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def sizes(directory: Place) -> dict[str, int]:
    """The size of each file in it by name, and -1 for what is no regular file: a link could lead elsewhere."""
    if isinstance(directory, Remote):
        return directory.sizes()
    with os.scandir(directory) as entries:
        return {
            entry.name: entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else -1
            for entry in entries
        }


def read_bytes(file: Place) -> bytes:
    return file.ask("cat_file") if isinstance(file, Remote) else file.read_bytes()


@contextmanager
def reading(file: Place) -> Iterator[Reader]:
    """Opens a file; a Remote is asked for just those bytes that are read."""
    if isinstance(file, Remote):

        def fetch(start: int, into: memoryview) -> int:
            data = file.ask("cat_file", start=start, end=start + len(into)) if len(into) else b""
            into[: len(data)] = data
            return len(data)

        yield fetch
        return
    with file.open("rb", buffering=0) as opened:

        def read(start: int, into: memoryview) -> int:
            done = 0
            while count := os.preadv(opened.fileno(), [into[done:]], start + done):
                done += count
            return done

        yield read


@contextmanager
def writing(file: Place) -> Iterator[IO[bytes]]:
    """A new file; on leaving it is durable."""
    if isinstance(file, Remote):
        with _failures(), file.files.open(file.path, "wb") as opened:
            yield opened
        return
    with io.BufferedWriter(_Eager(file, "xb")) as opened:
        yield opened
        opened.flush()
        os.fsync(opened.fileno())


class _Eager(io.FileIO):
    """A file whose bytes are on their way to the disk while more are written: by itself the kernel begins late."""

    _sent = 0

    def write(self, data: Any) -> int:
        count = super().write(data)
        if (end := self.tell()) - self._sent >= SENT_AT_ONCE and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fileno(), self._sent, end - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = end
        return count
