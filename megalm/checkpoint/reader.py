"""Loading a checkpoint: read and verify every box that is needed, then copy its intersection with each target.

Nothing is changed on any rank before everything is known to be intact on all. What a rank needs waits for that in the
host's memory; where there is too little of it, in parts that are read twice, and verified twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
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
    logger,
    open_manifest,
    read_manifest,
    strangers,
    warn,
)
from megalm.checkpoint.places import Place, Reader, reading
from megalm.checkpoint.ranks import rank_in, together
from megalm.checkpoint.shard import Shard, whole
from megalm.errors import UserError, nearest

THREADS = 4
LEAST_BATCH = 256 << 20  # bytes
RANKS_OF_A_HOST = 16  # at most, or nearly


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
    batches: list[list[Piece]]
    kept: list[torch.Tensor]

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
        nonlocal batches, kept
        batches = _batches(found[1], _spare_memory(1 if group is None else group.size()))
        for batch in batches:
            kept = _read(directory, found[0], batch)

    def fill() -> None:
        for batch in batches:
            _copy(batch, kept if len(batches) == 1 else _read(directory, found[0], batch))

    together(group, find, compare)
    together(group, verify)
    together(group, fill)
    return found[0].state


def read_tensor(directory: Place, manifest: CheckpointManifest, name: str) -> torch.Tensor:
    """One tensor of a checkpoint, whole."""
    record = manifest.tensors[name]
    (shard,) = whole({name: torch.empty(record.shape, dtype=getattr(torch, record.dtype))})
    pieces = _pieces(directory, manifest, {name}, shard)
    _copy(pieces, _read(directory, manifest, pieces))
    return shard.tensor


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
            state = load(place, into, group=group, accept=partial(accept, place))
            if rank_in(group) == 0:
                _tell_strangers(place)
            return place, state
        except DamagedCheckpoint as damage:
            damaged(damage)
    if together(group, judge=lambda ranks: damages):
        raise UserError(f"{root}: no checkpoint is intact: choose another run.dir, or remove this one")
    return None


def _tell_strangers(directory: Place) -> None:
    with suppress(UserError, OSError):  # of what was loaded already
        for line in strangers(directory, *open_manifest(directory)):
            logger.warning("%s; it was left alone", line)


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


def _spare_memory(ranks: int) -> int:
    """Bytes that may be taken for what is on its way: this rank's share of half of what its host has left."""
    with suppress(OSError), open("/proc/meminfo") as file:
        lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 512 // min(ranks, RANKS_OF_A_HOST)
    return LEAST_BATCH


def _batches(pieces: list[Piece], limit: int) -> list[list[Piece]]:
    """The pieces in order, in parts of at most `limit` bytes, or of one piece."""
    batches: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if batches[-1] and size + piece.bytes > max(limit, LEAST_BATCH):
            batches.append([])
            size = 0
        batches[-1].append(piece)
        size += piece.bytes
    return batches


def _read(directory: Place, manifest: CheckpointManifest, pieces: list[Piece]) -> list[torch.Tensor]:
    """The verified bytes of each piece's box. Several are read at once: a disk, a network and checksums overlap."""

    def header(name: str) -> None:
        record = manifest.files[name]
        _fetched(directory / name, 0, record.header, record.checksum, "the header")

    def box(piece: Piece) -> torch.Tensor:
        box = piece.box
        return _fetched(directory / box.file, box.start, piece.bytes, box.checksum, f"tensor '{piece.shard.name}'")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(header, sorted({piece.box.file for piece in pieces})))
        return list(pool.map(box, pieces))


def _fetched(path: Place, start: int, size: int, checksum: str, what: str) -> torch.Tensor:
    data = torch.empty(size, dtype=torch.uint8)
    try:
        with reading(path) as read:
            fetch(read, start, data, checksum, f"{path}: {what}")
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from error
    return data


def _copy(pieces: list[Piece], read: list[torch.Tensor]) -> None:
    for piece, data in zip(pieces, read, strict=True):
        source = data.view(piece.shard.tensor.dtype).reshape(piece.box.size)
        target = piece.shard.data[piece.common.within(piece.shard.region)]
        target.copy_(source[piece.common.within(piece.box.region)])


def fetch(read: Reader, start: int, data: torch.Tensor, checksum: str, what: str) -> None:
    """Reads `data` from `start` on and verifies it."""
    view = data.numpy().data
    if read(start, view) < len(view):
        raise DamagedCheckpoint(f"{what} ends too early")
    if xxhash.xxh3_128_hexdigest(view) != checksum:
        raise DamagedCheckpoint(f"{what} does not match its checksum: the file was altered or belongs elsewhere")
