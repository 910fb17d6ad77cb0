"""How a checkpoint comes into being and goes away, so that at any moment each is there whole or does not count.

    Directory       .step-N.tmp-<uuid>/rank-00000.safetensors ...   the draft; then the manifest, and all is renamed
                    step-N/                                         .step-N.old-<uuid>/ is on its way out
    ObjectStore     step-N/rank-00000-<id>.safetensors ...          the draft; it counts when its manifest is put
                    step-N/manifest.json                            the first to be deleted

All of it is done by rank 0 alone. Who is alive is told by a Directory's lock: whoever saves holds it, the kernel drops
it when its holder dies, so whatever is unfinished there when the lock is taken belongs to nobody.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from megalm.checkpoint.manifest import HIDDEN, MANIFEST, VISIBLE, complete, numbered
from megalm.checkpoint.places import Place, Remote, names
from megalm.errors import UserError
from megalm.files import sync_directory, write_atomic
from megalm.locks import Lock, NoLocks, lock


@dataclass(frozen=True)
class Draft:
    """Where the ranks' files of an unfinished checkpoint go."""

    folder: str
    """In the root."""
    ending: str
    """Of the files' names."""

    def file(self, rank: int) -> str:
        return f"rank-{rank:05d}{self.ending}.safetensors"


class Store(Protocol):
    def hold(self) -> AbstractContextManager:
        """Keeps other savers out while it is entered, where that can be done. Raises UserError if one is there."""

    def draft(self, step: int, needed: int) -> Draft:
        """A new one; raises OSError if there is no room for `needed` bytes."""

    def commit(self, draft: Draft, step: int, manifest: bytes) -> Place:
        """Makes a draft whose files are durable the checkpoint of `step`, in place of one that is there."""

    def discard(self, draft: Draft) -> None:
        """Removes what is there of a draft that failed."""

    def retire(self, steps: Iterable[int]) -> None:
        """Deletes checkpoints."""


def store_of(root: Place) -> Store:
    return ObjectStore(root) if isinstance(root, Remote) else Directory(root)


def retired(root: Place, newest: int | None, keep: int, keep_every: int | None) -> list[int]:
    """The steps of the checkpoints to delete: those older than the `keep` newest complete ones, but never a multiple of
    `keep_every`. Those later than `newest`, if it is given, are of another course of the run and are left alone."""
    whole = {path.name for path in complete(root, silent)}
    steps = {step: path.name in whole for step, seen, path in numbered(root) if seen}
    kept = [step for step, intact in steps.items() if intact and (newest is None or step <= newest)][:keep]
    if len(kept) < keep:
        return []
    return [step for step in steps if step < kept[-1] and not (keep_every and step % keep_every == 0)]


def silent(_: object) -> None:
    """What is damaged was, or will be, said elsewhere."""


class Directory:
    def __init__(self, root: Path) -> None:
        self.root = root

    def hold(self) -> AbstractContextManager:
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            held: Lock | None = lock(self.root / ".lock", wait=False)
        except NoLocks:
            return nullcontext()  # nobody can tell who is alive
        if held is None:
            why = "another process is saving there: wait for it, or give each run its own run.dir"
            raise UserError(f"{self.root}: {why}")
        self._sweep()
        return held

    def _sweep(self) -> None:
        """Deletes what killed runs left, but nothing out of sight that is newer than the newest complete checkpoint."""
        left = [match for name in names(self.root) if (match := HIDDEN.fullmatch(name))]
        newest = -1
        if any(match[2] == "old" for match in left):
            seen = (VISIBLE.fullmatch(path.name) for path in complete(self.root, silent))
            newest = next((int(match[1]) for match in seen if match), -1)
        for match in left:
            if match[2] == "tmp" or int(match[1]) <= newest:
                shutil.rmtree(self.root / match[0], ignore_errors=True)

    def draft(self, step: int, needed: int) -> Draft:
        if (free := shutil.disk_usage(self.root).free) < needed * 1.05:
            raise OSError(errno.ENOSPC, f"only {free} bytes are free")
        draft = Draft(self._hidden(step, "tmp").name, "")
        (self.root / draft.folder).mkdir()
        return draft

    def commit(self, draft: Draft, step: int, manifest: bytes) -> Path:
        """What is replaced is out of sight between the two renames, where `complete` still finds it."""
        temporary, target = self.root / draft.folder, self._visible(step)
        write_atomic(temporary / MANIFEST, manifest)
        replaced = self._hidden(step, "old") if os.path.lexists(target) else None
        if replaced:
            target.rename(replaced)
        try:
            temporary.rename(target)
        except BaseException:
            if replaced:
                replaced.rename(target)
            raise
        sync_directory(self.root)
        if replaced:
            shutil.rmtree(replaced, ignore_errors=True)
        return target

    def discard(self, draft: Draft) -> None:
        shutil.rmtree(self.root / draft.folder, ignore_errors=True)

    def retire(self, steps: Iterable[int]) -> None:
        """Out of sight first, so that a kill in between never leaves half a directory under a checkpoint's name."""
        retired = [self._visible(step).rename(self._hidden(step, "old")) for step in steps]
        if retired:
            sync_directory(self.root)
        for path in retired:
            shutil.rmtree(path, ignore_errors=True)

    def _visible(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def _hidden(self, step: int, kind: str) -> Path:
        return self.root / f".step-{step:08d}.{kind}-{uuid4().hex}"


class ObjectStore:
    def __init__(self, root: Remote) -> None:
        self.root = root

    def hold(self) -> AbstractContextManager:
        return nullcontext()  # there are no locks; a run's own directory has one

    def draft(self, step: int, needed: int) -> Draft:
        draft = Draft(f"step-{step:08d}", f"-{uuid4().hex[:12]}")
        (self.root / draft.folder).ask("makedirs", exist_ok=True)  # nothing, but where there are real directories
        return draft

    def commit(self, draft: Draft, step: int, manifest: bytes) -> Remote:
        """From the moment that the manifest is put, what it does not name belongs to nobody."""
        target = self.root / draft.folder
        (target / MANIFEST).ask("pipe_file", manifest)
        named = (MANIFEST, f"{draft.ending}.safetensors")
        self._remove(target, [name for name in names(target) if not name.endswith(named)])
        return target

    def discard(self, draft: Draft) -> None:
        target = self.root / draft.folder
        with suppress(OSError):
            self._remove(target, [name for name in names(target) if name.endswith(f"{draft.ending}.safetensors")])

    def retire(self, steps: Iterable[int]) -> None:
        for step in steps:
            directory = self.root / f"step-{step:08d}"
            if MANIFEST in (there := names(directory)):
                (directory / MANIFEST).ask("rm_file")
            self._remove(directory, [name for name in there if name != MANIFEST])
            if directory.ask("exists"):  # where there are real directories
                directory.ask("rm", recursive=True)

    def _remove(self, directory: Remote, files: list[str]) -> None:
        for name in files:
            (directory / name).ask("rm_file")
