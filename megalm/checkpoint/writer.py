"""Saving a checkpoint, so that a kill or a full disk at any moment leaves every earlier one as it was.

    rank 0      lock ROOT, sweep what dead runs left, make .step-N.tmp-<uuid>/
    all ranks   write a file each, fsync it
    rank 0      write the manifest, fsync, rename to step-N, fsync ROOT
                rename those beyond the last k out of sight, fsync ROOT, delete them

Who is alive is told by the lock: whoever saves holds it, the kernel drops it when its holder dies, so whatever is
unfinished in ROOT when the lock is taken belongs to nobody.

A tensors' file is written by hand, since the safetensors library gives neither the bytes' positions nor a moment
between having them and writing them. Format (https://github.com/huggingface/safetensors#format): header length as 8
little-endian bytes, JSON header, raw little-endian bytes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import xxhash
from torch.distributed import ProcessGroup

from megalm.checkpoint.manifest import DTYPES, HIDDEN, MANIFEST, VISIBLE, CheckpointManifest, complete
from megalm.checkpoint.ranks import rank_in, together
from megalm.checkpoint.shard import BOX_BYTES, Shard, cut
from megalm.errors import UserError
from megalm.files import sync_directory, write_atomic
from megalm.locks import Lock, NoLocks, lock


def save(
    root: Path,
    step: int,
    shards: Sequence[Shard],
    state: dict[str, Any],
    keep: int,
    group: ProcessGroup | None = None,
) -> Path:
    """Writes `root`/step-NNNNNNNN, replacing one of the same step, and keeps the `keep` newest up to `step`.

    All ranks of `group` call it together with what each holds, which must make up every tensor; `root` is on a file
    system that they share. `state` is rank 0's, and JSON: its floats come back exactly. Memory: one box, if it is not
    contiguous on the CPU. Raises UserError, on all ranks, if any of them cannot write; then nothing of it is left, and
    what was there before is intact.
    """
    target = root / f"step-{step:08d}"
    mine = [shard for shard in shards if shard.primary and (shard.region.volume or not prod(shard.shape))]
    intact: list[int] = []
    with ExitStack() as stack:  # of rank 0 alone

        def begin(sizes: list[int]) -> list[Any]:
            nonlocal intact
            with _told(target, needed := sum(sizes)):
                root.mkdir(parents=True, exist_ok=True)
                held = _lock(root)
                stack.enter_context(held or nullcontext())
                intact = [int(match[1]) for path in complete(root) if (match := VISIBLE.fullmatch(path.name))]
                if held:
                    _sweep(root, max(intact, default=-1))
                if (free := shutil.disk_usage(root).free) < needed * 1.05:
                    raise OSError(errno.ENOSPC, f"only {free} bytes are free")
                temporary = _hidden(target, "tmp")
                temporary.mkdir()
                stack.push(lambda kind, *_: shutil.rmtree(temporary, ignore_errors=True) if kind else None)
                return [temporary.name, needed]

        def write() -> dict[str, Any]:
            file = f"rank-{rank_in(group):05d}.safetensors"
            with _told(target, needed, file):
                return write_shards(temporary / file, mine) if mine else {}

        def finish(written: list[dict[str, Any]]) -> None:
            with _told(target, needed):
                write_atomic(temporary / MANIFEST, _manifest(step, state, written).to_bytes())
                _commit(temporary, target)
                kept = sorted((other for other in {*intact, step} if other <= step), reverse=True)[:keep]
                if len(kept) == keep:
                    _retire(root, kept[-1])

        name, needed = together(group, lambda: sum(shard.data.nbytes for shard in mine), begin)
        temporary = root / name
        together(group, write, finish)
    return target


@contextmanager
def _told(target: Path, needed: int, file: str = "") -> Iterator[None]:
    """Says what could not be written where, to the user."""
    try:
        yield
    except OSError as error:
        what = f"{target}: cannot write a checkpoint of {needed} bytes: {file and f'{file}: '}{error.strerror}"
        hint = " (do all ranks see the same file system?)" if file and error.errno == errno.ENOENT else ""
        raise UserError(f"{what}{hint}; earlier ones are intact") from error


def _lock(root: Path) -> Lock | None:
    """The lock of `root`; None on a file system without locks, where nobody can tell who is alive."""
    try:
        held = lock(root / ".lock", wait=False)
    except NoLocks:
        return None
    if held is None:
        raise UserError(f"{root}: another process is saving there: give each run its own run.dir")
    return held


def _hidden(directory: Path, kind: str) -> Path:
    return directory.with_name(f".{directory.name}.{kind}-{uuid4().hex}")


def _sweep(root: Path, newest: int) -> None:
    """Deletes what killed runs left, but nothing out of sight that is newer than the newest complete checkpoint."""
    for path in root.iterdir():
        if (match := HIDDEN.fullmatch(path.name)) and (match[2] == "tmp" or int(match[1]) <= newest):
            shutil.rmtree(path, ignore_errors=True)


def write_shards(path: Path, shards: Sequence[Shard]) -> dict[str, Any]:
    """Writes and syncs one safetensors file; gives its record, and the name, shape, dtype and box of all it holds.

    Wide elements come first, so that each tensor is aligned to its own.
    """
    shards = sorted(shards, key=lambda shard: (-shard.tensor.element_size(), shard.name, shard.offset))
    layout: dict[str, Any] = {}
    end = 0
    for shard in shards:
        begin, end = end, end + shard.data.nbytes
        key = shard.name if shard.name not in layout else f"{shard.name}@{shard.offset}"
        entry = {"dtype": DTYPES[shard.dtype][0], "shape": list(shard.size), "data_offsets": [begin, end]}
        assert layout.setdefault(key, entry) is entry, f"{key} is held twice"
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    parts = []
    with path.open("xb") as file:
        file.write(header)
        for shard in shards:
            for region in cut(shard.region, BOX_BYTES // shard.tensor.element_size()):
                piece = shard.data[region.within(shard.region)].cpu().contiguous()
                flat = piece.as_strided((piece.numel(),), (1,))  # one element is contiguous whatever its stride
                data = flat.view(torch.uint8).numpy().data
                place = {"file": path.name, "start": file.tell(), "checksum": xxhash.xxh3_128_hexdigest(data)}
                parts.append([shard.name, shard.shape, shard.dtype, asdict(region) | place])
                file.write(data)
        file.flush()
        os.fsync(file.fileno())
    checksum = xxhash.xxh3_128_hexdigest(header)
    record = {"size": len(header) + end, "header": len(header), "checksum": checksum}
    return {"files": {path.name: record}, "parts": parts}


def _manifest(step: int, state: dict[str, Any], written: list[dict[str, Any]]) -> CheckpointManifest:
    """Of what all ranks wrote. Raises ValueError if that does not make up whole tensors."""
    tensors: dict[str, dict[str, Any]] = {}
    files = {}
    for rank in written:
        files.update(rank.get("files", {}))
        for name, shape, dtype, box in rank.get("parts", ()):
            tensor = tensors.setdefault(name, {"shape": shape, "dtype": dtype, "boxes": []})
            if (shape, dtype) != (tensor["shape"], tensor["dtype"]):
                raise ValueError(f"tensor '{name}': {dtype} {shape} on one rank, {tensor} on another")
            tensor["boxes"].append(box)
    records = {name: tensors[name] for name in sorted(tensors)}
    return CheckpointManifest.model_validate({"step": step, "state": state, "files": files, "tensors": records})


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
