"""Loading a checkpoint: read and verify every box that is needed, then copy its intersection with each target.

The files are read twice, so that nothing is changed on any rank before everything is known to be intact on all, in the
memory of one box; the second reading mostly comes from the page cache, and is verified again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
import xxhash
from torch.distributed import ProcessGroup

from megalm.checkpoint.manifest import (
    MANIFEST,
    Box,
    CheckpointManifest,
    DamagedCheckpoint,
    Region,
    complete,
    read_manifest,
    warn,
)
from megalm.checkpoint.places import Place, Reader, reading
from megalm.checkpoint.ranks import rank_in, together
from megalm.checkpoint.shard import Shard
from megalm.errors import UserError, nearest


@dataclass(frozen=True)
class Piece:
    """What one box gives to one shard: the elements of `common`."""

    shard: Shard
    box: Box
    bytes: int
    common: Region


def load(
    directory: Place,
    into: Sequence[Shard],
    prefix: str = "",
    group: ProcessGroup | None = None,
    accept: Callable[[dict[str, Any]], None] = lambda state: None,
) -> dict[str, Any]:
    """Fills the shards of all ranks of `group` from a checkpoint of any layout, in place, and returns its state.

    Together they must name exactly the checkpoint's tensors whose names begin with `prefix` ("model." leaves the
    optimizer's unread), with the same shapes and dtypes: else UserError. `accept` may refuse the state before any
    tensor is read. Raises DamagedCheckpoint, with nothing changed, if a byte of what any rank needs is not what was
    saved; whatever is raised is raised on all ranks. A rank reads the boxes that its shards touch, no others.
    """
    found: tuple[CheckpointManifest, list[Piece]]

    def find() -> list[Any]:
        nonlocal found
        manifest = read_manifest(directory)
        accept(manifest.state)
        names = {name for name in manifest.tensors if name.startswith(prefix)}
        pieces = [piece for shard in into for piece in _pieces(directory, manifest, names, shard)]
        found = manifest, sorted(pieces, key=lambda piece: (piece.box.file, piece.box.start))
        return [manifest.checksum, sorted({shard.name for shard in into})]

    def compare(ranks: list[list[Any]]) -> None:
        manifest = found[0]
        if any(checksum != manifest.checksum for checksum, _ in ranks):
            raise DamagedCheckpoint(f"{directory / MANIFEST}: two ranks read different ones")
        used = {name for _, names in ranks for name in names}
        for name in sorted(manifest.tensors):
            if name.startswith(prefix) and name not in used:
                hint = nearest(name, used)
                raise UserError(f"{directory}: has a tensor '{name}', for which this run has no use.{hint}")

    def verify() -> None:
        for _ in _read(directory, *found):
            pass

    def fill() -> None:
        for piece, data in _read(directory, *found):
            source = data.view(piece.shard.tensor.dtype).reshape(piece.box.size)
            target = piece.shard.data[piece.common.within(piece.shard.region)]
            target.copy_(source[piece.common.within(piece.box.region)])

    together(group, find, compare)
    together(group, verify)
    together(group, fill)
    return found[0].state


def load_newest(
    root: Place,
    into: Sequence[Shard],
    group: ProcessGroup | None = None,
    accept: Callable[[Place, dict[str, Any]], None] = lambda found, state: None,
    refuse_damaged: bool = False,
) -> tuple[Place, dict[str, Any]] | None:
    """Loads the newest intact checkpoint in `root`, and gives its place and state; None if there is none, damaged or
    not. What is damaged is said, and the one before tried; or the first such is a UserError, if those are refused."""
    damages = 0

    def damaged(damage: DamagedCheckpoint) -> None:
        nonlocal damages
        damages += 1
        if refuse_damaged:
            raise UserError(f"{damage}; to use the one before, set checkpoint.on_corrupt=fallback")
        if rank_in(group) == 0:
            warn(damage)

    found = complete(root, damaged)
    while name := together(group, judge=lambda ranks: next((path.name for path in found), None)):
        place = root / name
        try:
            return place, load(place, into, group=group, accept=partial(accept, place))
        except DamagedCheckpoint as damage:
            damaged(damage)
    if together(group, judge=lambda ranks: damages):
        raise UserError(f"{root}: no checkpoint is intact: choose another run.dir, or remove this one")
    return None


def _pieces(directory: Place, manifest: CheckpointManifest, names: set[str], shard: Shard) -> list[Piece]:
    """What a shard takes from each of its tensor's boxes: all of its elements, each once."""
    if shard.name not in names:
        raise UserError(f"{directory}: has no tensor '{shard.name}', which this run needs.{nearest(shard.name, names)}")
    tensor = manifest.tensors[shard.name]
    ours, theirs = f"{shard.dtype} {list(shard.shape)}", f"{tensor.dtype} {list(tensor.shape)}"
    if ours != theirs:
        raise UserError(f"{directory}: tensor '{shard.name}' is {theirs}, but this run's is {ours}")
    found = [(box, box.region.intersection(shard.region)) for box in tensor.boxes]
    pieces = [Piece(shard, box, tensor.bytes_of(box), common) for box, common in found if common]
    covered = sum(piece.common.volume for piece in pieces)
    assert covered == shard.region.volume, f"{shard.name}: {covered} of {shard.region.volume} elements covered"
    return pieces


def _read(directory: Place, manifest: CheckpointManifest, pieces: list[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Each piece, which come sorted by file, with its box's verified bytes, good until the next one is asked for."""
    buffer = torch.empty(max((piece.bytes for piece in pieces), default=0), dtype=torch.uint8)
    for name, of_file in groupby(pieces, key=lambda piece: piece.box.file):
        path, record = directory / name, manifest.files[name]
        try:
            with reading(path) as read:
                header = torch.empty(record.header, dtype=torch.uint8)
                fetch(read, 0, header, record.checksum, f"{path}: the header")
                for piece in of_file:
                    data = buffer[: piece.bytes]
                    fetch(read, piece.box.start, data, piece.box.checksum, f"{path}: tensor '{piece.shard.name}'")
                    yield piece, data
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: {error.strerror}") from error


def fetch(read: Reader, start: int, data: torch.Tensor, checksum: str, what: str) -> None:
    """Reads `data` from `start` on and verifies it."""
    view = data.numpy().data
    if read(start, view) < len(view):
        raise DamagedCheckpoint(f"{what} ends too early")
    if xxhash.xxh3_128_hexdigest(view) != checksum:
        raise DamagedCheckpoint(f"{what} does not match its checksum: the file was altered or belongs elsewhere")
