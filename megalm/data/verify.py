"""Is a prepared directory what its manifest says? Every byte of every file is read: `megalm data verify`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from megalm.data.indexed import open_shard
from megalm.data.manifest import NAME, Manifest, Shard
from megalm.errors import UserError
from megalm.files import file_checksum

SHARD_FILE = re.compile(r"shard-\d+\.(bin|idx)")

OnProgress = Callable[[int, int], None]
"""Told now and then: bytes read, and of how many."""


def verify(directory: Path, on_progress: OnProgress = lambda done, total: None) -> list[str]:
    """What is wrong with a prepared directory, each problem in one line that names the file; none if it is intact.

    A `UserError` says that the manifest is missing or damaged: then there is nothing to compare with.
    """
    manifest = Manifest.load(directory)
    problems = []
    files = {
        shard.name: [directory / f"{shard.name}{suffix}" for suffix in (".bin", ".idx")] for shard in manifest.shards
    }
    sizes = {path: path.stat().st_size for pair in files.values() for path in pair if path.is_file()}
    total, done = sum(sizes.values()), 0

    def advance(new: int) -> None:
        nonlocal done
        done += new
        on_progress(done, total)

    for shard in manifest.shards:
        problems += _verify_shard(directory, manifest, shard, advance)
    for path in sorted(directory.iterdir()):
        if SHARD_FILE.fullmatch(path.name) and path not in sizes:
            problems.append(f"{path}: not in {NAME}: nothing reads it")
    return problems


def _verify_shard(directory: Path, manifest: Manifest, shard: Shard, advance: Callable[[int], None]) -> list[str]:
    problems = []
    for suffix, checksum in ((".bin", shard.bin_checksum), (".idx", shard.idx_checksum)):
        path = directory / f"{shard.name}{suffix}"
        if not path.is_file():
            problems.append(f"{path}: the file is missing")
        elif file_checksum(path, advance) != checksum:
            problems.append(f"{path}: altered: its checksum is not the manifest's")
    if problems:  # whose fault it is that the two do not fit together is known
        return problems
    try:
        open_shard(directory, manifest, shard).verify()
    except UserError as error:
        problems.append(str(error).removesuffix(": prepare the data again"))
    return problems
