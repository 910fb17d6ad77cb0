"""What a checkpoint is on disk, and how the newest complete one is found.

    ROOT/step-00000100/rank-00000.safetensors     one file a writing rank, of its boxes; safetensors readers open it
    ROOT/step-00000100/manifest.json              the only thing that gives those bytes a meaning
    ROOT/.step-00000200.tmp-<uuid>/               being written, or left by a killed run: never read
    ROOT/.step-00000050.old-<uuid>/               out of sight, to be deleted

A tensor is a global shape cut into boxes without gap or overlap, each of them a contiguous run of bytes in one file:

    tensors: {name: {shape, dtype, boxes: [{offset, size, file, start, checksum}]}}     offset, size: n numbers each

so that loading into any layout is box intersection. Every byte of a step's directory is under a checksum (xxh3-128):
a box's bytes under the box's, a file's safetensors header under the file's, the manifest's own under its first line's.
A directory counts as a checkpoint when its manifest is intact and every file that it names has the right size.

An object store has no renaming, so there each save's files have names of their own, and its manifest, put in place
last, makes them count.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Final, Literal, Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StringConstraints, ValidationError, model_validator

from megalm.checkpoint.places import Place, Remote, names, read_bytes, sizes
from megalm.errors import UserError

MANIFEST = "manifest.json"
FORMAT: Final = "megalm-checkpoint"
VERSION: Final = 1
MANIFEST_LIMIT = 1 << 30  # bytes; refused above, before anything of that size is allocated

# torch's name of a dtype -> safetensors' name, bytes an element
DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}

Sizes = tuple[NonNegativeInt, ...]
Checksum = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # in the directory, nowhere else

VISIBLE = re.compile(r"step-(\d{8,})")
HIDDEN = re.compile(r"\.step-(\d{8,})\.(tmp|old)-[0-9a-f]{32}")

logger = logging.getLogger("megalm")


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete or altered; an older one may be intact."""


@dataclass(frozen=True)
class Region:
    """An axis-aligned box of a tensor's elements: `size` of them from `offset`, in each dim."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def volume(self) -> int:
        return math.prod(self.size)

    def intersection(self, other: Region) -> Region | None:
        """The elements in both, or None if there are none."""
        starts = tuple(map(max, self.offset, other.offset))
        ends = (min(a + n, b + m) for a, n, b, m in zip(self.offset, self.size, other.offset, other.size, strict=True))
        common = Region(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))
        return common if all(length > 0 for length in common.size) else None

    def within(self, outer: Region) -> tuple[slice, ...]:
        """Where this region lies in an array that holds `outer`."""
        return tuple(
            slice(start - base, start - base + length)
            for start, length, base in zip(self.offset, self.size, outer.offset, strict=True)
        )


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Box(Record):
    """A part of a tensor: where it lies in the tensor, and where its bytes are."""

    offset: Sizes
    size: Sizes
    file: FileName
    start: NonNegativeInt
    """Position in the file, in bytes."""
    checksum: Checksum

    @property
    def region(self) -> Region:
        return Region(self.offset, self.size)


class TensorRecord(Record):
    shape: Sizes
    dtype: str
    boxes: tuple[Box, ...]

    @property
    def region(self) -> Region:
        return Region((0,) * len(self.shape), self.shape)

    def bytes_of(self, box: Box) -> int:
        return box.region.volume * DTYPES[self.dtype][1]

    @model_validator(mode="after")
    def boxes_tile_the_shape(self) -> Self:
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype '{self.dtype}'")
        for box in self.boxes:
            if not len(box.offset) == len(box.size) == len(self.shape):
                raise ValueError("a box has another number of dims than its tensor")
            if any(start + length > dim for start, length, dim in zip(box.offset, box.size, self.shape, strict=True)):
                raise ValueError("a box reaches out of its tensor")
        # Each element counts once where the boxes' corners, with alternating signs, add up to the whole's: the corners
        # are the mixed difference of the count, which is one to one, and are found without comparing each two boxes.
        corners: Counter[tuple[int, ...]] = Counter()
        for region, sign in [(box.region, 1) for box in self.boxes] + [(self.region, -1)]:
            for ends in product((0, 1), repeat=len(self.shape)):
                corner = tuple(start + end * n for start, end, n in zip(region.offset, ends, region.size, strict=True))
                corners[corner] += sign * (-1) ** sum(ends)
        if any(corners.values()):
            gap = sum(box.region.volume for box in self.boxes) < self.region.volume
            raise ValueError("the boxes leave a gap" if gap else "two boxes overlap")
        return self


class FileRecord(Record):
    size: NonNegativeInt
    header: NonNegativeInt
    """Bytes before the first tensor's."""
    checksum: Checksum
    """Of those bytes; the others are under their box's."""


class CheckpointManifest(Record):
    format: Literal["megalm-checkpoint"] = FORMAT
    version: Literal[1] = VERSION
    step: NonNegativeInt
    state: dict[str, Any]
    """The caller's JSON: whatever is not a tensor."""
    files: dict[FileName, FileRecord]
    tensors: dict[str, TensorRecord]
    checksum: str = Field("", exclude=True)
    """Of all else, if it was read from a file."""

    @model_validator(mode="after")
    def boxes_lie_in_the_files(self) -> Self:
        for name, tensor in self.tensors.items():
            for box in tensor.boxes:
                file = self.files.get(box.file)
                if file is None or box.start < file.header or box.start + tensor.bytes_of(box) > file.size:
                    raise ValueError(f"a box of tensor '{name}' is not inside a file of this checkpoint")
        return self

    def check_size(self, directory: Place, name: str, there: dict[str, int]) -> None:
        """Raises DamagedCheckpoint if a file is not as large as it was."""
        if (size := _regular_size(directory, name, there)) != self.files[name].size:
            raise DamagedCheckpoint(f"{directory / name}: {size} bytes, but the manifest says {self.files[name].size}")

    def to_bytes(self) -> bytes:
        """The file: one JSON object, whose first key is the checksum of all that follows that line."""
        body = json.dumps(self.model_dump()).encode()[1:]
        return _first_line(body) + body


def _first_line(body: bytes) -> bytes:
    return b'{"checksum": "%s",\n' % xxhash.xxh3_128_hexdigest(body).encode()


def read_manifest(directory: Place) -> CheckpointManifest:
    """The manifest of a step's directory, after checking it and the sizes of all files that it names.

    Raises DamagedCheckpoint, which names the file, or UserError for what is no checkpoint of this version.
    """
    manifest, there = open_manifest(directory)
    for name in manifest.files:
        manifest.check_size(directory, name, there)
    return manifest


def open_manifest(directory: Place) -> tuple[CheckpointManifest, dict[str, int]]:
    """The manifest, checked, and the `sizes` of what is beside it, not compared yet. Raises as `read_manifest` does."""
    path = directory / MANIFEST
    try:
        there = sizes(directory)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpoint(
            f"{directory}: no such checkpoint: give a step's directory, such as checkpoints/step-00000100"
        ) from None
    except OSError as error:
        raise DamagedCheckpoint(f"{directory}: {error.strerror}") from error
    if _regular_size(directory, MANIFEST, there) > MANIFEST_LIMIT:
        raise DamagedCheckpoint(f"{path}: larger than {MANIFEST_LIMIT} bytes")
    try:
        content = read_bytes(path)
        if not content.startswith(b'{"checksum": "'):
            raise DamagedCheckpoint(f"{path}: is no checkpoint's manifest")
        line, newline, body = content.partition(b"\n")
        if line + newline != _first_line(body):
            raise DamagedCheckpoint(f"{path}: the manifest does not match its own checksum")
        fields = json.loads(content)
        if (version := fields.get("version")) != VERSION:
            raise UserError(f"{path}: version {version}, but this megalm reads {VERSION}: use the one that wrote it")
        return CheckpointManifest.model_validate(fields), there
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise DamagedCheckpoint(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: malformed JSON: {error}") from error


def strangers(directory: Place, manifest: CheckpointManifest, there: Iterable[str]) -> list[str]:
    """A line for each name that is there and no part of the checkpoint."""
    names = sorted({*there} - {*manifest.files, MANIFEST})
    return [f"{directory / name}: is no part of this checkpoint" for name in names]


def _regular_size(directory: Place, name: str, there: dict[str, int]) -> int:
    if name not in there:
        raise DamagedCheckpoint(f"{directory / name}: is missing")
    if there[name] < 0:
        raise DamagedCheckpoint(f"{directory / name}: not a regular file")
    return there[name]


def numbered(root: Place) -> list[tuple[int, bool, Place]]:
    """Step, whether it is in sight, and place of all that has a checkpoint's name, newest first."""
    found = []
    for name in names(root):
        if match := VISIBLE.fullmatch(name) or HIDDEN.fullmatch(name):
            hidden = match.re is HIDDEN
            if not hidden or match[2] == "old":
                found.append((int(match[1]), not hidden, root / name))
    return sorted(found, key=lambda each: each[:2], reverse=True)


def check_name(directory: Place, manifest: CheckpointManifest) -> None:
    """Raises DamagedCheckpoint if the directory is named for another step than its manifest is of."""
    match = VISIBLE.fullmatch(directory.name) or HIDDEN.fullmatch(directory.name)
    if match and int(match[1]) != manifest.step:
        raise DamagedCheckpoint(f"{directory / MANIFEST}: of step {manifest.step}")


def warn(damage: DamagedCheckpoint) -> None:
    logger.warning("%s; this checkpoint is damaged and was skipped: trying the one before", damage)


def complete(root: Place, damaged: Callable[[DamagedCheckpoint], None] = warn) -> Iterator[Place]:
    """`root`'s complete checkpoints, newest first; a broken one is told to `damaged`, and skipped unless that raises.

    One that is out of sight still counts until it is deleted: a save that replaces a step may be killed between its
    two renames. Where nothing can be renamed, one without a manifest was never complete. Tensor bytes are not read
    here; `load` verifies them.
    """
    for _, _, path in numbered(root):
        if isinstance(path, Remote) and MANIFEST not in path.sizes():
            continue
        try:
            check_name(path, read_manifest(path))
        except DamagedCheckpoint as error:
            damaged(error)
        else:
            yield path


def latest(root: Place) -> Place | None:
    """The newest complete checkpoint, or None if there is none."""
    return next(complete(root), None)
