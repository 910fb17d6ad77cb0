"""What is in a checkpoint, whether every byte of it is what was saved, how two differ, and which need not be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megalm.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    DamagedCheckpoint,
    check_name,
    numbered,
    open_manifest,
    strangers,
)
from megalm.checkpoint.places import Place, names, reading
from megalm.checkpoint.reader import fetch, read_tensor
from megalm.checkpoint.stores import retired, store_of
from megalm.errors import UserError


def checkpoints_at(path: Place) -> list[Place]:
    """`path` itself if it is a checkpoint's directory, or all in it, the oldest first; UserError if there is none."""
    found = [directory for _, seen, directory in reversed(numbered(path)) if seen]
    if not found and MANIFEST not in names(path):
        raise UserError(f"{path}: holds no checkpoint: name a run directory, or one of its checkpoints/step-...")
    return found or [path]


def problems(directory: Place, advance: Callable[[int], None] = lambda count: None) -> list[str]:
    """All that is wrong with a checkpoint, by file and tensor: every byte is read. `advance` is told how many were."""
    try:
        manifest, there = open_manifest(directory)
        check_name(directory, manifest)
    except UserError as error:
        return [str(error)]
    found = strangers(directory, manifest, there)
    boxes: dict[str, list[tuple[int, int, str, str]]] = {name: [] for name in manifest.files}
    for name, record in manifest.files.items():
        boxes[name].append((0, record.header, record.checksum, "the header"))
    for name, tensor in manifest.tensors.items():
        for box in tensor.boxes:
            boxes[box.file].append((box.start, tensor.bytes_of(box), box.checksum, f"tensor '{name}'"))
    for name, parts in boxes.items():
        path = directory / name
        try:
            manifest.check_size(directory, name, there)
        except DamagedCheckpoint as damage:
            found.append(str(damage))
            continue
        try:
            with reading(path) as read:
                for start, size, checksum, what in sorted(parts):
                    try:
                        fetch(read, start, torch.empty(size, dtype=torch.uint8), checksum, f"{path}: {what}")
                    except DamagedCheckpoint as damage:
                        found.append(str(damage))
                    advance(size)
        except OSError as error:
            found.append(f"{path}: {error.strerror}")
    return found


@dataclass(frozen=True)
class Difference:
    name: str
    what: str


def differing_tensors(first: Place, second: Place) -> Iterator[Difference]:
    """The tensors in which two checkpoints differ, one after the other; two of them are in memory."""
    one, other = (open_manifest(directory)[0] for directory in (first, second))
    for name in sorted({*one.tensors, *other.tensors}):
        kinds = [_kind(manifest, name) for manifest in (one, other)]
        if None in kinds:
            yield Difference(name, f"only in {first if kinds[0] else second}")
        elif kinds[0] != kinds[1]:
            yield Difference(name, f"{kinds[0]} -> {kinds[1]}")
        else:
            a, b = (read_tensor(place, manifest, name) for place, manifest in ((first, one), (second, other)))
            if not torch.equal(_bytes(a), _bytes(b)):
                apart = (a.double() - b.double()).abs()
                yield Difference(name, f"{int((a != b).sum()):,} of {a.numel():,} differ, by at most {apart.max():.3g}")


def _kind(manifest: CheckpointManifest, name: str) -> str | None:
    tensor = manifest.tensors.get(name)
    return None if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def prune(root: Place, keep: int, keep_every: int | None, dry_run: bool) -> list[int]:
    """Deletes all checkpoints but the `keep` newest complete ones and the multiples of `keep_every`; gives their steps.
    Raises UserError while someone is saving there."""
    if checkpoints_at(root) == [root]:
        raise UserError(f"{root}: is one checkpoint: name its run's directory")
    store = store_of(root)
    if dry_run:
        return retired(root, None, keep, keep_every)
    with store.hold():
        steps = retired(root, None, keep, keep_every)
        store.retire(steps)
    return steps


def totals(manifest: CheckpointManifest) -> dict[str, Any]:
    """Counts of what a checkpoint holds."""
    model = [tensor for name, tensor in manifest.tensors.items() if name.startswith("model.")]
    return {
        "parameters": sum(tensor.region.volume for tensor in model),
        "tensors": len(manifest.tensors),
        "files": len(manifest.files),
        "bytes": sum(file.size for file in manifest.files.values()),
    }
