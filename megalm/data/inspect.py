"""Looks into a prepared directory: are its files what the manifest says, and what do its documents read like?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from megalm.data.indexed import open_shard
from megalm.data.manifest import Manifest
from megalm.data.tokenizer import Tokenizer
from megalm.errors import UserError
from megalm.files import file_checksum


class Sample(NamedTuple):
    """A decoded document and where it lies."""

    shard: str
    document: int
    tokens: int
    text: str


def verify(
    directory: Path, manifest: Manifest, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Reads every file whole and compares it with the manifest; a `UserError` names the damaged ones.

    `on_progress` is told the number of shards done, and of all.
    """
    damaged: list[str] = []
    for done, shard in enumerate(manifest.shards):
        on_progress(done, len(manifest.shards))
        try:
            open_shard(directory, manifest, shard).verify()
        except UserError as error:
            damaged.append(str(error).removesuffix(": prepare the data again"))
            continue
        for suffix, checksum in ((".bin", shard.bin_checksum), (".idx", shard.idx_checksum)):
            path = directory / f"{shard.name}{suffix}"
            if file_checksum(path) != checksum:
                damaged.append(f"{path}: altered: its checksum is not the manifest's")
    on_progress(len(manifest.shards), len(manifest.shards))
    if damaged:
        more = f" (and {len(damaged) - 3} more)" if len(damaged) > 3 else ""
        raise UserError(f"{'; '.join(damaged[:3])}{more}: prepare the data again")


def samples(directory: Path, manifest: Manifest, tokenizer: Tokenizer, count: int) -> Iterator[Sample]:
    """Up to `count` documents, evenly spaced over all of them, decoded by the tokenizer that the manifest names."""
    if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
        raise UserError(
            f"{manifest.tokenizer.path}: not the tokenizer that {directory} was prepared with: give that one with "
            "--tokenizer"
        )
    count = min(count, manifest.documents)
    wanted = iter([i * manifest.documents // count for i in range(count)])
    number = next(wanted, None)
    first = 0
    for shard in manifest.shards:
        while number is not None and number < first + shard.documents:
            ids = open_shard(directory, manifest, shard).document(number - first)
            yield Sample(shard.name, number - first, len(ids), tokenizer.decode(ids))
            number = next(wanted, None)
        first += shard.documents
