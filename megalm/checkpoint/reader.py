"""Loading a checkpoint: read and verify every box that is needed, then copy its intersection with each target.

The files are read twice, so that nothing is changed before everything is known to be intact, in the memory of one box;
the second reading mostly comes from the page cache, and is verified again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

from megalm.checkpoint.manifest import Box, CheckpointManifest, DamagedCheckpoint, Region, TensorRecord, read_manifest
from megalm.checkpoint.writer import dtype_name
from megalm.errors import UserError, nearest


@dataclass(frozen=True)
class Piece:
    """What one box gives to one target: the elements of `common`."""

    name: str
    box: Box
    bytes: int
    common: Region


def load(directory: Path, into: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, Any]:
    """Copies the checkpoint's tensors into those of the same name, in place, and returns its state.

    `into` must have exactly the checkpoint's tensors whose names begin with `prefix` ("model." leaves the optimizer's
    unread), with the same shapes and dtypes: else UserError. Raises DamagedCheckpoint, with nothing changed, if a byte
    of what is needed is not what was saved.
    """
    manifest = read_manifest(directory)
    _compare(directory, manifest, into, prefix)
    whole = {name: manifest.tensors[name].region for name in into}
    pieces = [piece for name, region in whole.items() for piece in _pieces(name, manifest.tensors[name], region)]
    pieces.sort(key=lambda piece: (piece.box.file, piece.box.start))
    for _ in _read(directory, manifest, pieces):
        pass
    with torch.no_grad():
        for piece, data in _read(directory, manifest, pieces):
            target = into[piece.name]
            source = data.view(target.dtype).reshape(piece.box.size)
            target[piece.common.within(whole[piece.name])].copy_(source[piece.common.within(piece.box.region)])
    return manifest.state


def _compare(directory: Path, manifest: CheckpointManifest, into: Mapping[str, torch.Tensor], prefix: str) -> None:
    there = {name for name in manifest.tensors if name.startswith(prefix)}
    for name in into:
        if name not in there:
            raise UserError(f"{directory}: has no tensor '{name}', which this run needs.{nearest(name, there)}")
    for name in sorted(there):
        if name not in into:
            raise UserError(f"{directory}: has a tensor '{name}', for which this run has no use.{nearest(name, into)}")
    for name, target in into.items():
        tensor = manifest.tensors[name]
        ours = f"{dtype_name(target)} {list(target.shape)}"
        theirs = f"{tensor.dtype} {list(tensor.shape)}"
        if ours != theirs:
            raise UserError(f"{directory}: tensor '{name}' is {theirs}, but this run's is {ours}")


def _pieces(name: str, tensor: TensorRecord, target: Region) -> list[Piece]:
    """What `target`, a region of the tensor, takes from each of the tensor's boxes: all of its elements, each once."""
    found = [(box, box.region.intersection(target)) for box in tensor.boxes]
    pieces = [Piece(name, box, tensor.bytes_of(box), common) for box, common in found if common]
    covered = sum(piece.common.volume for piece in pieces)
    assert covered == target.volume, f"{name}: {covered} of {target.volume} elements covered"
    return pieces


def _read(directory: Path, manifest: CheckpointManifest, pieces: list[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Each piece, which come sorted by file, with its box's verified bytes, good until the next one is asked for."""
    buffer = torch.empty(max((piece.bytes for piece in pieces), default=0), dtype=torch.uint8)
    for name, of_file in groupby(pieces, key=lambda piece: piece.box.file):
        path, record = directory / name, manifest.files[name]
        try:
            with path.open("rb", buffering=0) as file:
                header = torch.empty(record.header, dtype=torch.uint8)
                _fill(file, 0, header, record.checksum, f"{path}: the header")
                for piece in of_file:
                    data = buffer[: piece.bytes]
                    _fill(file, piece.box.start, data, piece.box.checksum, f"{path}: tensor '{piece.name}'")
                    yield piece, data
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: {error.strerror}") from error


def _fill(file: BinaryIO, start: int, data: torch.Tensor, checksum: str, what: str) -> None:
    """Reads `data` from `start` on and verifies it."""
    view = data.numpy().data
    file.seek(start)
    done = 0
    while done < len(view):
        if not (count := file.readinto(view[done:])):  # type: ignore[attr-defined]
            raise DamagedCheckpoint(f"{what} ends too early")
        done += count
    if xxhash.xxh3_128_hexdigest(view) != checksum:
        raise DamagedCheckpoint(f"{what} does not match its checksum: the file was altered or belongs elsewhere")
