"""Saving checkpoints, so that a kill or a full disk at any moment leaves every earlier one as it was.

    the step loop                                            threads of each rank
    start    rank 0: lock the root, make a draft       --->  copy the rank's boxes in the host's memory
    ...      the next step's passes
    settle   before the optimizer changes anything     <---
    ...      steps go on, and add up who has written         checksum, write and sync one file
    commit   all: give rank 0 their file's parts
             rank 0: manifest, put the draft in place  --->  rank 0: delete what need not be kept, unlock

Nothing is sent between ranks in the background. Saving at once is the same without the copy and the threads.

A tensors' file is written by hand, since the safetensors library gives neither the bytes' positions nor a moment
between having them and writing them. Format (https://github.com/huggingface/safetensors#format): header length as 8
little-endian bytes, JSON header, raw little-endian bytes.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from threading import Thread
from typing import Any, TypeVar

import torch
import xxhash
from torch.distributed import ProcessGroup

from megalm.checkpoint.manifest import DTYPES, CheckpointManifest
from megalm.checkpoint.places import Place, writing
from megalm.checkpoint.ranks import rank_in, together
from megalm.checkpoint.shard import Shard, box_bytes, spread
from megalm.checkpoint.stores import Draft, retired, store_of
from megalm.errors import UserError

CHUNK = 64 << 10
"""Bytes that are written while the checksum's reading has them in the cache. Small also for ext4 of Linux 6.18: 956 MB,
synced, took 0.4 to 0.5 s in chunks of 64 KiB, 0.5 to 0.6 s of 128, 1.2 to 1.6 s of 1,024."""

T = TypeVar("T")


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    step: int
    state: dict[str, Any]
    draft: Draft
    needed: int
    written: Future[dict[str, Any]] | Callable[[], dict[str, Any]]


class Saver:
    """Saves checkpoints in `root`, one at a time; all ranks of `group` call each method together.

    The `keep` newest up to the one just saved stay, and each whose step is a multiple of `keep_every`. With
    `asynchronous`, ranks go on while they write, and have a second copy of what they save in the host's memory.
    Whatever cannot be written is a UserError on all ranks; then nothing of it is left, and what was there before is
    intact.
    """

    def __init__(
        self,
        root: Place,
        keep: int,
        keep_every: int | None = None,
        group: ProcessGroup | None = None,
        asynchronous: bool = False,
    ) -> None:
        self.root, self._store, self._group = root, store_of(root), group
        self._keep, self._keep_every, self._asynchronous = keep, keep_every, asynchronous
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._pending: _Pending | None = None
        self._copying: Future[None] = Future()
        self._copying.set_result(None)
        self._held: AbstractContextManager = nullcontext()
        self._tidying: Future[None] | None = None

    @property
    def pending(self) -> int | None:
        """The step that is being saved."""
        return self._pending.step if self._pending else None

    @property
    def progress(self) -> float:
        """Adds up over all ranks to their number or more when `commit` need wait for none, or one has failed."""
        written = self._pending and self._pending.written
        if not isinstance(written, Future) or not written.done():
            return 0.0
        return float("inf") if written.exception() else 1.0

    def start(self, step: int, shards: Sequence[Shard], state: dict[str, Any]) -> None:
        """Begins to save what each rank holds, which must make up every tensor; it may change after `settle`. `state`
        is rank 0's, and JSON: its floats come back exactly. Nothing else may be pending."""
        assert self._pending is None
        needed = sum(shard.data.nbytes // shard.copy[1] for shard in shards if shard.primary)

        def begin(sizes: list[int]) -> list[Any]:
            with _told(self.root, step, total := sum(sizes)):
                self._tidied()
                self._held = self._store.hold()
                try:
                    return [asdict(self._store.draft(step, total)), total]
                except BaseException:
                    self._release()
                    raise

        fields, total = together(self._group, lambda: needed, begin)
        draft = Draft(**fields)

        def write() -> dict[str, Any]:
            file = draft.file(rank_in(self._group))
            with _told(self.root, step, total, file):
                return write_boxes(self.root / draft.folder / file, boxes) if boxes else {}

        boxes = sorted(spread(shards, box_bytes(total)), key=_place_in_file)
        self._pending = _Pending(step, state, draft, total, write)
        if self._asynchronous:
            try:
                boxes = self._copied(boxes)
            except RuntimeError as error:  # torch's, for memory
                why = f"no memory for a copy to write from: set checkpoint.asynchronous=false ({error})"
                self._copying.set_exception(UserError(f"{self.root}: {why}"))
            self._pending.written = _in_background(lambda: self._copying.result() or write())

    def settle(self) -> None:
        """Waits until what is being saved may change."""
        wait([self._copying])

    def commit(self) -> Place:
        """Waits until all ranks have written, and makes that the newest checkpoint."""
        pending, self._pending = self._pending, None
        assert pending is not None
        target = None

        def finish(written: list[dict[str, Any]]) -> None:
            nonlocal target
            with _told(self.root, pending.step, pending.needed):
                manifest = _manifest(pending.step, pending.state, written).to_bytes()
                target = self._store.commit(pending.draft, pending.step, manifest)

        act = pending.written.result if isinstance(pending.written, Future) else pending.written
        try:
            together(self._group, act, finish)
        except BaseException:
            if rank_in(self._group) == 0:
                if target is None:
                    self._store.discard(pending.draft)
                self._release()
            raise
        if rank_in(self._group) == 0:
            self._tidying = _in_background(lambda: self._tidy(pending.step))
        return self.root / f"step-{pending.step:08d}"

    def close(self) -> None:
        """Waits for what is still to be deleted."""
        together(self._group, judge=lambda _: self._tidied())

    def abandon(self) -> None:
        """What is pending will never be; for a rank that fails alone, so it waits for no other."""
        pending, self._pending = self._pending, None
        if pending and rank_in(self._group) == 0:
            self._store.discard(pending.draft)
            self._release()

    def _copied(self, boxes: list[Shard]) -> list[Shard]:
        """The boxes in the host's memory, one after the other, once `_copying` is done; the same memory each time."""
        self._copying = Future()
        on_gpu = any(box.tensor.is_cuda for box in boxes)
        if self._buffer.numel() < (size := sum(box.data.nbytes for box in boxes)):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # before there are two
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        copies, end = [], 0
        for box in boxes:  # wide elements first, so all are aligned
            start, end = end, end + box.data.nbytes
            host = self._buffer[start:end].view(box.tensor.dtype).view(box.size)
            copies.append(replace(box, tensor=host))
        if on_gpu:  # from where it takes no time to speak of
            copy_boxes(boxes, copies)
            torch.cuda.synchronize()
            self._copying.set_result(None)
        else:
            self._copying = _in_background(lambda: copy_boxes(boxes, copies))
        return copies

    def _tidy(self, newest: int) -> None:
        """On rank 0: deletes what need not be kept, and lets others in."""
        try:
            self._store.retire(retired(self.root, newest, self._keep, self._keep_every))
        except OSError as error:
            raise UserError(f"{self.root}: cannot delete an old checkpoint: {error.strerror}") from error
        finally:
            self._release()

    def _tidied(self) -> None:
        tidying, self._tidying = self._tidying, None
        if tidying:
            tidying.result()

    def _release(self) -> None:
        held, self._held = self._held, nullcontext()
        held.__exit__(None, None, None)


def save(
    root: Place, step: int, shards: Sequence[Shard], state: dict[str, Any], keep: int, group: ProcessGroup | None = None
) -> Place:
    """Writes `root`/step-NNNNNNNN at once; see `Saver`. Memory: one box, if it is not contiguous on the CPU."""
    saver = Saver(root, keep, group=group)
    saver.start(step, shards, state)
    saved = saver.commit()
    saver.close()
    return saved


def _in_background(act: Callable[[], T]) -> Future[T]:
    """A thread that does not keep a process alive that ends otherwise: what it leaves is swept."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def copy_boxes(boxes: Sequence[Shard], copies: Sequence[Shard]) -> None:
    for box, copy in zip(boxes, copies, strict=True):
        copy.tensor.copy_(box.data, non_blocking=True)


@contextmanager
def _told(root: Place, step: int, needed: int, file: str = "") -> Iterator[None]:
    """Says what could not be written where, to the user."""
    try:
        yield
    except OSError as error:
        target = root / f"step-{step:08d}"
        what = f"{target}: cannot write a checkpoint of {needed} bytes: {file and f'{file}: '}{error.strerror}"
        hint = " (do all ranks see the same file system?)" if file and error.errno == errno.ENOENT else ""
        raise UserError(f"{what}{hint}; earlier ones are intact") from error


def _place_in_file(box: Shard) -> tuple[Any, ...]:
    """Wide elements come first, so that each box is aligned to its own."""
    return -box.tensor.element_size(), box.name, box.offset


def write_boxes(path: Place, boxes: Sequence[Shard]) -> dict[str, Any]:
    """Writes one safetensors file, durably; gives its record, and the name, shape, dtype and box of all it holds."""
    layout: dict[str, Any] = {}
    end = 0
    for box in boxes:
        begin, end = end, end + box.data.nbytes
        key = box.name if box.name not in layout else f"{box.name}@{box.offset}"
        entry = {"dtype": DTYPES[box.dtype][0], "shape": list(box.size), "data_offsets": [begin, end]}
        assert layout.setdefault(key, entry) is entry, f"{key} is held twice"
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    parts = []
    start = len(header)
    with writing(path) as file:
        file.write(header)
        for box in boxes:
            piece = box.data.cpu().contiguous()
            flat = piece.as_strided((piece.numel(),), (1,))  # one element is contiguous whatever its stride
            data = flat.view(torch.uint8).numpy().data
            checksum = xxhash.xxh3_128()
            for chunk in range(0, len(data), CHUNK):
                checksum.update(data[chunk : chunk + CHUNK])
                file.write(data[chunk : chunk + CHUNK])
            place = {"file": path.name, "start": start, "checksum": checksum.hexdigest()}
            parts.append([box.name, box.shape, box.dtype, asdict(box.region) | place])
            start += len(data)
    record = {"size": start, "header": len(header), "checksum": xxhash.xxh3_128_hexdigest(header)}
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
