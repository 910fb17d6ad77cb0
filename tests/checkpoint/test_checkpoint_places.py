"""Checkpoints in object stores, as fsspec reaches them: the manifest, put last, is the commit."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import shared_store
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks
from saving_process import content, read_consistent

from megalm.checkpoint import DamagedCheckpoint, Place, Saver, Shard, complete, latest, load, place, read_manifest, save
from megalm.checkpoint import whole as whole_shards
from megalm.checkpoint.inspect import problems, prune
from megalm.checkpoint.manifest import MANIFEST
from megalm.checkpoint.places import Remote, names
from megalm.errors import UserError


@pytest.fixture
def root() -> Place:
    return place(f"memory://{uuid4().hex}/checkpoints")


def put(root: Place, step: int, keep: int = 9, value: int | None = None) -> Place:
    value = step if value is None else value
    return save(root, step, whole_shards(content(value)), {"value": value}, keep)


def steps(root: Place) -> list[int]:
    return [read_manifest(directory).step for directory in complete(root)]


def overwrite(file: Place, change: Any) -> None:
    assert isinstance(file, Remote)
    file.ask("pipe_file", change(bytearray(file.ask("cat_file"))))


def flipped(data: bytearray) -> bytes:
    data[-1] ^= 1
    return bytes(data)


def test_a_path_is_a_path_and_a_url_is_remote(tmp_path: Path) -> None:
    assert place(str(tmp_path)) == tmp_path
    assert place(f"file://{tmp_path}") == tmp_path
    assert isinstance(place("memory://x"), Remote)
    with pytest.raises(UserError, match=r"checkpoint\.path=nosuch://bucket/x: .*nosuch") as caught:
        place("nosuch://bucket/x", "checkpoint.path")
    assert "\n" not in str(caught.value)


def test_what_is_saved_is_loaded_and_the_newest_are_kept(root: Place) -> None:
    assert latest(root) is None
    for step in (1, 2, 3, 4):
        directory = put(root, step, keep=2)
        assert read_consistent(directory) == (step, step)
    assert steps(root) == [4, 3]
    assert sorted(names(root)) == ["step-00000003", "step-00000004"]
    assert not problems(directory)
    assert prune(root, 1, None, dry_run=True) == [3]
    assert steps(root) == [4, 3]
    assert prune(root, 1, None, dry_run=False) == [3]
    assert steps(root) == [4]


def test_saving_a_step_again_replaces_it_when_the_manifest_is_put(root: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = put(root, 5, value=1)
    before = names(directory)
    ask = Remote.ask

    def no_manifest(self: Remote, method: str, *args: Any, **options: Any) -> Any:
        if method == "pipe_file":
            assert len(names(directory)) == 3  # both files are there, and the first manifest
            raise OSError(5, "Input/output error")
        return ask(self, method, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Remote, "ask", no_manifest)
        with pytest.raises(UserError, match="Input/output error"):
            put(root, 5, value=2)
    assert names(directory) == before
    assert read_consistent(directory) == (5, 1)
    put(root, 5, value=2)
    assert read_consistent(directory) == (5, 2)
    assert len(names(directory)) == 2


def test_damage_is_found_and_named(root: Place) -> None:
    for step in (1, 2, 3):
        put(root, step)
    (shard,) = (name for name in names(root / "step-00000003") if name != MANIFEST)
    overwrite(root / "step-00000003" / shard, flipped)
    with pytest.raises(DamagedCheckpoint, match=f"{shard}: tensor 'tensor.7' does not match its checksum"):
        load(root / "step-00000003", whole_shards(content(0)))
    assert [shard in problem for problem in problems(root / "step-00000003")] == [True]
    overwrite(root / "step-00000003" / shard, lambda data: bytes(data[:-1]))
    assert steps(root) == [2, 1]
    overwrite(root / "step-00000002" / MANIFEST, flipped)
    assert steps(root) == [1]


def test_what_a_killed_run_left_does_not_count_and_goes_with_the_step(root: Place) -> None:
    put(root, 1)
    left = root / "step-00000002" / "rank-00000-0123456789ab.safetensors"
    assert isinstance(left, Remote)
    left.ask("pipe_file", b"half")
    assert steps(root) == [1]
    put(root, 2)
    assert steps(root) == [2, 1]
    assert len(names(root / "step-00000002")) == 2


def test_a_store_that_fails_in_its_own_way_is_said_in_one_line(root: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(root, Remote)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no credentials\nat all")

    put(root, 1)
    monkeypatch.setattr(type(root.files), "open", fail)
    with pytest.raises(UserError, match="RuntimeError: no credentials"):
        put(root, 2)


# Several processes, which share a store


def half(step: int, rank: int) -> list[Shard]:
    return [Shard("x", torch.full((1000,), step), (2000,), (1000 * rank,), (1000,))]


def save_until_killed(url: str, victim: int, delay: float) -> None:
    shared_store.register()
    rank, root = dist.get_rank(), place(url)
    first = max(steps(root), default=0) + 1
    saver = Saver(root, 2, None, dist.group.WORLD, asynchronous=True)
    for step in range(first, 10**6):
        if step == first + 1 and rank == victim:
            threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        saver.start(step, half(step, rank), {"step": step})
        saver.commit()


def load_newest(url: str) -> tuple[int, list[int]]:
    shared_store.register()
    newest = latest(place(url))
    assert newest is not None
    (mine,) = half(-1, dist.get_rank())
    state = load(newest, [mine], group=dist.group.WORLD)
    return state["step"], mine.tensor.unique().tolist()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.full)])
def test_kills_leave_the_newest_whole_where_nothing_can_be_renamed(tmp_path: Path, kills: int) -> None:
    url, dice = f"shared://{tmp_path}/bucket", random.Random(kills)
    shared_store.register()
    for kill in range(kills):
        with pytest.raises(RankError):
            run_ranks(2, save_until_killed, url, dice.randrange(2), dice.uniform(0, 0.3), grace=2)
        (step, values), other = run_ranks(2, load_newest, url)
        assert (step, values) == other
        assert values == [step]
        assert step > kill
        for directory in complete(place(url)):
            assert not [problem for problem in problems(directory) if "is no part of" not in problem]
