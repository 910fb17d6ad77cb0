"""Saving a checkpoint, so that a kill or a full disk at any moment leaves every earlier one as it was.

    lock ROOT -> sweep what dead runs left -> write .step-N.tmp-<uuid>/ -> fsync -> rename to step-N -> fsync ROOT
              -> rename those beyond the last k out of sight -> fsync ROOT -> delete them

Who is alive is told by the lock: whoever saves holds it, the kernel drops it when its holder dies, so whatever is
unfinished in ROOT when the lock is taken belongs to nobody.

The tensors' file is written by hand, since the safetensors library gives neither the bytes' positions nor a moment
between having them and writing them. Format (https://github.com/huggingface/safetensors#format): header length as 8
little-endian bytes, JSON header, raw little-endian bytes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import xxhash

from megalm.checkpoint.manifest import (
    DTYPES,
    HIDDEN,
    MANIFEST,
    VISIBLE,
    Box,
    CheckpointManifest,
    FileRecord,
    TensorRecord,
    complete,
)
from megalm.errors import UserError
from megalm.files import sync_directory, write_atomic


def save(root: Path, step: int, tensors: Mapping[str, torch.Tensor], state: dict[str, Any], keep: int) -> Path:
    """Writes `root`/step-NNNNNNNN, replacing one of the same step, and keeps the `keep` newest up to `step`.

    `state` is JSON: its floats come back exactly. Memory: one tensor, if it is not a contiguous one on the CPU.
    Raises UserError if it cannot be written; then nothing of it is left, and what was there before is intact.
    """
    target = root / f"step-{step:08d}"
    needed = sum(tensor.nbytes for tensor in tensors.values())
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root) as alone:
            intact = [int(match[1]) for path in complete(root) if (match := VISIBLE.fullmatch(path.name))]
            if alone:
                _sweep(root, max(intact, default=-1))
            if (free := shutil.disk_usage(root).free) < needed * 1.05:
                raise OSError(errno.ENOSPC, f"only {free} bytes are free")
            temporary = _hidden(target, "tmp")
            try:
                temporary.mkdir()
                _write(temporary, step, tensors, state)
                _commit(temporary, target)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            kept = sorted((other for other in {*intact, step} if other <= step), reverse=True)[:keep]
            if len(kept) == keep:
                _retire(root, kept[-1])
    except OSError as error:
        raise UserError(
            f"{target}: cannot write a checkpoint of {needed} bytes: {error.strerror}; earlier ones are intact"
        ) from error
    return target


@contextmanager
def _locked(root: Path) -> Iterator[bool]:
    """Holds `root`'s lock; yields False on a file system without locks, where nobody can tell who is alive."""
    with (root / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{root}: another process is saving there: give each run its own run.dir") from None
        except OSError:
            yield False
        else:
            yield True


def _hidden(directory: Path, kind: str) -> Path:
    return directory.with_name(f".{directory.name}.{kind}-{uuid4().hex}")


def _sweep(root: Path, newest: int) -> None:
    """Deletes what killed runs left, but nothing out of sight that is newer than the newest complete checkpoint."""
    for path in root.iterdir():
        if (match := HIDDEN.fullmatch(path.name)) and (match[2] == "tmp" or int(match[1]) <= newest):
            shutil.rmtree(path, ignore_errors=True)


def _write(directory: Path, step: int, tensors: Mapping[str, torch.Tensor], state: dict[str, Any]) -> None:
    file = "rank-00000.safetensors"
    file_record, places = write_shard(directory / file, tensors)
    records = {}
    for name, tensor in sorted(tensors.items()):
        start, checksum = places[name]
        shape = tuple(tensor.shape)
        box = Box(offset=(0,) * len(shape), size=shape, file=file, start=start, checksum=checksum)
        records[name] = TensorRecord(shape=shape, dtype=dtype_name(tensor), boxes=(box,))
    manifest = CheckpointManifest(step=step, state=state, files={file: file_record}, tensors=records)
    write_atomic(directory / MANIFEST, manifest.to_bytes())


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[FileRecord, dict[str, tuple[int, str]]]:
    """Writes and syncs one safetensors file; gives its record, and where each tensor's bytes start and their checksum.

    Wide elements come first, so that each tensor is aligned to its own.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    layout: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        code = DTYPES[dtype_name(tensor)][0]
        layout[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    places = {}
    with path.open("xb") as file:
        file.write(header)
        for name in names:
            data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            places[name] = (len(header) + layout[name]["data_offsets"][0], xxhash.xxh3_128_hexdigest(data))
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    checksum = xxhash.xxh3_128_hexdigest(header)
    return FileRecord(size=len(header) + end, header=len(header), checksum=checksum), places


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _commit(temporary: Path, target: Path) -> None:
    """Renames `temporary` to `target`; what was there is out of sight in between, where `complete` still finds it."""
    replaced = _hidden(target, "old") if os.path.lexists(target) else None
    if replaced:
        target.rename(replaced)
    try:
        temporary.rename(target)
    except BaseException:
        if replaced:
            replaced.rename(target)
        raise
    sync_directory(target.parent)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)


def _retire(root: Path, oldest: int) -> None:
    """Deletes all checkpoints before step `oldest`.

    Out of sight first, so that a kill in between never leaves half a directory under a checkpoint's name.
    """
    names = [path for path in root.iterdir() if (match := VISIBLE.fullmatch(path.name)) and int(match[1]) < oldest]
    retired = [path.rename(_hidden(path, "old")) for path in names]
    if retired:
        sync_directory(root)
    for path in retired:
        shutil.rmtree(path, ignore_errors=True)
