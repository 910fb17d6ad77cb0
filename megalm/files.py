"""Files that matter: written to a temporary name, synced, then renamed, so that a reader sees all of it or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash


def sync_directory(path: Path) -> None:
    """Makes a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed to `path`, on failure removed."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        if error.filename is None:  # a write names no file
            error.filename = str(path)
        raise
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_atomic(path: Path, content: bytes) -> None:
    """Writes `content` to `path` in one indivisible step."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def file_checksum(path: Path, advance: Callable[[int], None] = lambda new: None) -> str:
    """xxh3-128 of a file's bytes, as hexadecimal. `advance` is told how many more are read."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()
