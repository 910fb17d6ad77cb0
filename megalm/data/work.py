"""The work directory of a preparation: what lets it be interrupted at any moment, and shared by several commands.

    .NAME.work/                 beside the output NAME
        data/                   becomes NAME when all units are done: shard-00000.bin, shard-00000.idx, ...
        units/00000.json        unit 0 is done: its shard is on the disk, and this is what was counted
        plan.json               which preparation this is
        start.lock              held while a command starts, and while one ends
        use.lock                shared by all that are at work, the worker processes among them
        rank-0.lock             held by the command of rank 0

A unit's record is written after its shard was synced and renamed, and carries the unit's key: a checksum of everything
that its shard follows from (files, sizes, times, tokenizer, settings). So a record with the right key says that the
unit need not be done again; whatever else lies here is of no use, and removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megalm.data.directory import check_output, exit_on_sigterm, make_parents, put_in_place, recover, remove_empty
from megalm.data.indexed import open_shard
from megalm.data.manifest import Manifest
from megalm.data.shards import UnitResult
from megalm.data.share import Share
from megalm.errors import UserError
from megalm.files import sync_directory, write_atomic
from megalm.locks import Lock, lock

PREPARATION = "preparation.json"
OWNED = re.compile(r"manifest\.json|preparation\.json|shard-\d+\.(bin|idx)")


class WorkDirectory:
    """The directory beside `output` for units with these `keys`; `plan` is a checksum of them all. See `opened`."""

    def __init__(self, output: Path, keys: Sequence[str], plan: str, share: Share) -> None:
        self.shown = output
        self.output = Path(os.path.realpath(output))
        self.root = self.output.with_name(f".{self.output.name}.work")
        self.data = self.root / "data"
        self.use_lock = self.root / "use.lock"
        self._units = self.root / "units"
        self._keys = keys
        self.plan = plan
        self._share = share

    def results(self) -> dict[int, UnitResult]:
        """Those of all units that are done, by number."""
        found = {}
        for number, key in enumerate(self._keys):
            with suppress(OSError, ValueError, KeyError, TypeError):  # missing, or of something else
                record = json.loads(self._record(number).read_bytes())
                result = UnitResult.from_json(record["result"])
                if record["key"] == key and all((self.data / name).exists() for name in files_of(result)):
                    found[number] = result
        return found

    def keep(self, number: int, result: UnitResult) -> None:
        """Notes that a unit is done; its shard is on the disk."""
        content = {"key": self._keys[number], "result": result.to_json()}
        write_atomic(self._record(number), json.dumps(content).encode())

    def preparation(self) -> dict[str, Any] | None:
        """What the output says of how it was made, if it is what this plan makes and no file of it is missing or cut,
        else None."""
        with suppress(OSError, ValueError, UserError):
            content = json.loads((self.output / PREPARATION).read_bytes())
            if isinstance(content, dict) and content.get("plan") == self.plan:
                manifest = Manifest.load(self.output)
                for shard in manifest.shards:
                    open_shard(self.output, manifest, shard)
                return content
        return None

    @contextmanager
    def opened(self, overwrite: bool) -> Iterator[bool]:
        """Makes or takes up the directory; yields whether the output is there already, complete.

        A `UserError` says that the output is something else, or that another command is at work on it. In the end, a
        work directory is removed that has no shard of a finished unit in it, or is of no more use.
        """
        made = make_parents(self.root.parent)
        use = rank = None
        with exit_on_sigterm():
            try:
                with self._started():
                    use = lock(self.use_lock, wait=False)
                    is_alone = use is not None
                    use = use or lock(self.use_lock, shared=True)
                    assert use is not None
                    if is_alone:
                        recover(self.output)
                    is_done = self.preparation() is not None
                    if not is_done:
                        check_output(self.shown, OWNED, overwrite)
                        self._take_up() if is_alone else self._join()
                        rank = self._lock_rank()
                    use.change(shared=True)
                yield is_done
            finally:
                if use is not None:
                    self._leave(use)
                if rank is not None:
                    rank.release()
                remove_empty(made)

    @contextmanager
    def ending(self) -> Iterator[bool]:
        """Holds off other commands, so that one of them publishes; yields whether that was done meanwhile."""
        try:
            start = lock(self.root / "start.lock")
        except FileNotFoundError:
            yield True
            return
        assert start is not None
        with start:
            yield self.preparation() is not None

    def publish(self, files: set[str]) -> None:
        """The data, of which all is there, becomes the output: `files` and nothing else."""
        _remove_others(self.data, files)
        sync_directory(self.data)
        put_in_place(self.data, self.output)
        _remove_others(self.output, files)  # what a worker of a killed command may just have begun
        self._discard()

    def _record(self, number: int) -> Path:
        return self._units / f"{number:05d}.json"

    def _shared(self) -> dict[str, Any]:
        """What the commands that share the directory must have in common."""
        return {"plan": self.plan, "world_size": self._share.world_size}

    def _started(self) -> Lock:
        while True:
            with suppress(FileNotFoundError):  # another command was at its end and removed the directory
                for directory in (self.root, self.data, self._units):
                    directory.mkdir(exist_ok=True)
                start = lock(self.root / "start.lock")
                assert start is not None
                return start

    def _take_up(self) -> None:
        """Removes all but the finished units of this plan; nobody else is at work."""
        done = self.results()
        _remove_others(self._units, {self._record(number).name for number in done})
        _remove_others(self.data, {name for result in done.values() for name in files_of(result)})
        write_atomic(self.root / "plan.json", json.dumps(self._shared()).encode())

    def _join(self) -> None:
        """Others are at work: it must be on the same."""
        try:
            plan = json.loads((self.root / "plan.json").read_bytes())
        except (OSError, ValueError):
            plan = None
        if plan != self._shared():
            raise UserError(
                f"--output {self.shown}: a command with other inputs or settings is at work on it, or just ending: "
                "wait until it has ended, or choose another directory"
            )

    def _lock_rank(self) -> Lock:
        held = lock(self.root / f"rank-{self._share.rank}.lock", wait=False)
        if held is None:
            rank = f"rank {self._share.rank} of " if self._share.world_size > 1 else ""
            raise UserError(
                f"--output {self.shown}: {rank}the same command is at work on it already: wait until it ends"
            )
        return held

    def _leave(self, use: Lock) -> None:
        with suppress(FileNotFoundError), self.ending() as is_done:
            is_last = use.is_in_place() and use.change(shared=False)
            if is_last and (is_done or not self._is_worth_keeping()):
                self._discard()
        use.release()

    def _discard(self) -> None:
        """Removes the directory: renamed first, so that who starts now makes a new one."""
        trash = self.output.with_name(f".{self.output.name}.trash")
        shutil.rmtree(trash, ignore_errors=True)
        self.root.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _is_worth_keeping(self) -> bool:
        """Whether there is a finished unit, of this plan or another, that has a shard."""
        return any(self._units.glob("*.json")) and any(self.data.glob("shard-*.bin"))


def files_of(result: UnitResult) -> list[str]:
    """The names of a unit's shard's files."""
    return [f"{result.shard.name}{suffix}" for suffix in (".bin", ".idx")] if result.shard else []


def _remove_others(directory: Path, names: set[str]) -> None:
    """Removes the files of `directory` that are not among `names`."""
    for path in directory.iterdir():
        if path.name not in names:
            path.unlink(missing_ok=True)
