"""Prepared directories to one: `megalm data merge`.

    A/shard-00000 ... A/shard-0000n, B/shard-00000 ...  --one after the other-->  OUTPUT/shard-00000, manifest.json

One large shard is kinder to a parallel file system than thousands of small ones. The documents keep their order, so the
tokens are those of the inputs back to back. Memory does not grow with the data.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megalm._indexed_dataset import merge as merge_shards
from megalm.data.directory import new_directory
from megalm.data.manifest import Manifest, Shard
from megalm.data.verify import verify
from megalm.data.work import OWNED
from megalm.errors import UserError
from megalm.files import file_checksum

NAME = "shard-00000"

OnProgress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much."""


def merge(
    directories: Sequence[Path],
    output: Path,
    *,
    overwrite: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Manifest:
    """Writes `output` from the documents of prepared directories, after checking every file of theirs.

    Raises a `UserError` that names the directory of another tokenizer than the first one's, or the damaged file.
    """
    manifests = [Manifest.load(directory) for directory in directories]
    for directory, manifest in zip(directories, manifests, strict=True):
        _check_alike(directory, manifest, directories[0], manifests[0])
    for directory in directories:
        if problems := verify(directory, partial(on_progress, f"Checking {directory}")):
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise UserError(f"{problems[0]}{more}: prepare the data again")
    prefixes = [
        directory / shard.name
        for directory, manifest in zip(directories, manifests, strict=True)
        for shard in manifest.shards
    ]
    if not prefixes:
        raise UserError(f"{directories[0]}: there is no document in it, so there is nothing to merge")
    try:
        with new_directory(output, OWNED, overwrite) as new:
            merge_shards(prefixes, new / NAME, partial(on_progress, "Merging"))
            merged = _merged_manifest(manifests, new)
            merged.save(new)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"--output {output}: {os.strerror(error.errno)}: nothing was written: free some space"
            ) from None
        raise
    return merged


def _check_alike(directory: Path, manifest: Manifest, first: Path, other: Manifest) -> None:
    here, there = manifest.tokenizer, other.tokenizer
    if here.fingerprint != there.fingerprint:
        raise UserError(
            f"{directory}: prepared with tokenizer {here.path!r} ({here.kind}, {here.vocab_size} ids, fingerprint "
            f"{here.fingerprint}), while {first} was prepared with {there.path!r} ({there.kind}, {there.vocab_size} "
            f"ids, fingerprint {there.fingerprint}): prepare both with one tokenizer"
        )
    if manifest.dtype != other.dtype:
        raise UserError(
            f"{directory}: stored as {manifest.dtype}, while {first} is stored as {other.dtype}: prepare both again"
        )


def _merged_manifest(manifests: Sequence[Manifest], directory: Path) -> Manifest:
    skipped: Counter[str] = Counter()
    for manifest in manifests:
        skipped.update(manifest.skipped)
    shard = Shard(
        NAME,
        sum(manifest.documents for manifest in manifests),
        sum(manifest.tokens for manifest in manifests),
        sum(manifest.text_bytes for manifest in manifests),
        *(file_checksum(directory / f"{NAME}{suffix}") for suffix in (".bin", ".idx")),
    )
    return Manifest(manifests[0].tokenizer, manifests[0].dtype, dict(sorted(skipped.items())), (shard,))
