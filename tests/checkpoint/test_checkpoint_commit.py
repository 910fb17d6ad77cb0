"""A kill, a full disk or a second run at any moment of saving leaves a newest checkpoint that is whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from saving_process import content, read_consistent

from megalm.checkpoint import complete, latest, load, save, whole
from megalm.errors import UserError


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*"))


def hidden(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob(".step-*"))


def put(root: Path, step: int, keep: int = 9, value: int | None = None) -> Path:
    value = step if value is None else value
    return save(root, step, whole(content(value)), {"value": value}, keep)


class Saver:
    """The saving process; each request runs in a child of it."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("saving_process.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def request(self, root: Path, **fields: Any) -> int:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"root": str(root)} | fields) + "\n")
        lines = iter(self.lines())
        self.rest = lines
        return int(next(line for line in lines if line.isdigit()))

    def lines(self) -> Iterator[str]:
        assert self.process.stdout
        for line in self.process.stdout:
            yield line.rstrip("\n")
            if line.startswith("ended"):
                return

    def finish(self) -> tuple[list[str], int]:
        """What the child said until it ended, and the signal that ended it (0: none)."""
        *said, ended = self.rest
        status = int(ended.split()[1])
        assert os.WIFSIGNALED(status) or status == 0
        return said, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.fixture(scope="module")
def saver() -> Iterator[Saver]:
    saver = Saver()
    yield saver
    assert saver.process.stdin
    saver.process.stdin.close()
    assert saver.process.wait(30) == 0
    assert saver.process.stdout
    saver.process.stdout.close()


def test_a_kill_at_a_random_moment_loses_at_most_the_save_under_way(saver: Saver, tmp_path: Path) -> None:
    dice = random.Random(5)
    for _ in range(20):
        pid = saver.request(tmp_path, steps=None, keep=2)
        first = next(saver.rest)  # however long that takes on a busy machine
        time.sleep(dice.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        said, ended_by = saver.finish()
        assert ended_by == signal.SIGKILL
        done = max(int(line.removeprefix("saved ")) for line in [first, *said])
        newest = latest(tmp_path)
        assert newest is not None
        assert read_consistent(newest)[0] in (done, done + 1)
        for step in steps(tmp_path):  # none that looks whole and is not
            assert read_consistent(tmp_path / f"step-{step:08d}") == (step, step)
        done = max(steps(tmp_path), default=0)
    assert done >= 20
    put(tmp_path, done + 1, keep=2)
    assert (steps(tmp_path), hidden(tmp_path)) == ([done, done + 1], [])


@pytest.mark.parametrize("step", [3, 2], ids=["a new step, the oldest retires", "the same step again, keep one"])
def test_a_kill_before_any_change_of_the_file_system_leaves_a_whole_newest_checkpoint(
    saver: Saver, tmp_path: Path, step: int
) -> None:
    outcomes = set()
    for die_at in range(100):
        root = tmp_path / str(die_at)
        put(root, 1)
        put(root, 2)
        saver.request(root, steps=[step], keep=step - 1, value=33, die_at=die_at)
        said, ended_by = saver.finish()
        for seen in steps(root):
            assert read_consistent(root / f"step-{seen:08d}")[0] == seen
        newest = latest(root)
        assert newest is not None
        outcome = read_consistent(newest)
        assert outcome in ((2, 2), (step, 33))
        outcomes.add(outcome)
        if not ended_by:
            assert said == [f"saved {step}"]
            assert outcome == (step, 33)
            break
        assert not said
        put(root, 4, keep=2)
        put(root, 5, keep=2)
        assert (steps(root), hidden(root)) == ([4, 5], [])
        shutil.rmtree(root)
    assert die_at > 12  # lock, directory, shard, manifest, syncs, renames, deletions
    assert outcomes == {(2, 2), (step, 33)}


def test_the_newest_k_are_kept(tmp_path: Path) -> None:
    for step in range(10, 60, 10):
        put(tmp_path, step, keep=2)
    assert (steps(tmp_path), hidden(tmp_path)) == ([40, 50], [])
    put(tmp_path, 60, keep=3)
    assert steps(tmp_path) == [40, 50, 60]


def test_a_broken_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step)
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    put(tmp_path, 4, keep=2)
    assert steps(tmp_path) == [2, 3, 4]
    put(tmp_path, 5, keep=2)
    assert steps(tmp_path) == [4, 5]


def test_later_steps_are_left_alone_and_never_push_out_the_one_just_saved(tmp_path: Path) -> None:
    for step in (10, 80, 90):
        put(tmp_path, step)
    put(tmp_path, 20, keep=1)
    assert steps(tmp_path) == [20, 80, 90]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    put(tmp_path, 5, value=1)
    (tmp_path / "step-00000005" / "rank-00000.safetensors").write_bytes(b"broken")
    directory = put(tmp_path, 5, value=2)
    assert read_consistent(directory) == (5, 2)
    assert not hidden(tmp_path)


def test_a_replaced_checkpoint_that_is_the_newest_outlives_the_next_save_until_that_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 1)
    aside = tmp_path / ".step-00000002.old-0123456789abcdef0123456789abcdef"  # killed between the two renames
    put(tmp_path, 2).rename(aside)
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: full)
        with pytest.raises(UserError):
            put(tmp_path, 3)
    assert latest(tmp_path) == aside
    assert read_consistent(aside) == (2, 2)
    put(tmp_path, 3)
    put(tmp_path, 4)
    assert (steps(tmp_path), hidden(tmp_path)) == ([1, 3, 4], [])


def test_if_the_rename_into_place_fails_the_one_before_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 5, value=1)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if ".tmp-" in path.name and path.is_dir():
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match="Input/output error"):
        put(tmp_path, 5, value=2)
    assert read_consistent(tmp_path / "step-00000005") == (5, 1)
    assert not hidden(tmp_path)


def assert_refused_and_intact(root: Path, message: str, reason: str) -> None:
    assert reason in message
    assert str(root / "step-00000002") in message
    assert str(sum(tensor.nbytes for tensor in content(2).values())) in message
    assert "\n" not in message
    assert (steps(root), hidden(root)) == ([1], [])
    assert read_consistent(root / "step-00000001") == (1, 1)


def test_too_little_space_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    free = sum(tensor.nbytes for tensor in content(2).values()) + 1000
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError) as caught:
        put(tmp_path, 2)
    assert_refused_and_intact(tmp_path, str(caught.value), f"only {free} bytes are free")


def test_a_write_that_fails_midway_leaves_nothing_behind(saver: Saver, tmp_path: Path) -> None:
    put(tmp_path, 1)
    saver.request(tmp_path, steps=[2], keep=1, file_limit=100_000)
    said, _ = saver.finish()
    assert len(said) == 1
    assert said[0].startswith("refused ")
    assert_refused_and_intact(tmp_path, said[0], "File too large")


def test_a_disk_that_fills_up_midway_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1800k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        root = disk / "checkpoints"
        put(root, 1)
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError) as caught:
            put(root, 2)
        assert_refused_and_intact(root, str(caught.value), "No space left on device")
    finally:
        subprocess.run(["umount", disk], check=True)


def leave_behind(root: Path) -> Path:
    leftover = root / ".step-00000001.tmp-0123456789abcdef0123456789abcdef"
    leftover.mkdir(parents=True)
    (leftover / "rank-00000.safetensors").write_bytes(b"half")
    return leftover


def test_a_second_run_in_the_same_place_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    leftover = leave_behind(tmp_path)
    with (tmp_path / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is saving there"):
            put(tmp_path, 2)
        assert leftover.exists()
    put(tmp_path, 2)
    assert not leftover.exists()


def test_where_there_are_no_locks_nothing_of_others_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    leftover = leave_behind(tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    assert read_consistent(put(tmp_path, 2)) == (2, 2)
    assert leftover.exists()


def test_a_root_that_cannot_be_made_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/checkpoints/step-00000001: .*Not a directory"):
        put(tmp_path / "file" / "checkpoints", 1)


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path, 1)
    assert list(complete(tmp_path)) == []
    assert not hidden(tmp_path)


def test_the_tensors_may_be_any_views(tmp_path: Path) -> None:
    base = torch.arange(24).reshape(4, 6)
    saved = {"columns": base[:, 1:3], "step": base[::2], "turned": base.T, "expanded": base[:1].expand(3, 6)}
    directory = save(tmp_path, 1, whole(saved), {}, keep=1)
    into = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in saved.items()}
    load(directory, whole(into))
    assert all(torch.equal(into[name], saved[name]) for name in saved)
