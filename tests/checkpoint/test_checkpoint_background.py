"""Saving goes on in the background: nothing waits for it but the copy, and whatever fails there fails everywhere."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks

from megalm.checkpoint import Saver, Shard, complete, load, read_manifest, save, whole, writer
from megalm.checkpoint.places import writing
from megalm.checkpoint.shard import box_bytes, spread
from megalm.errors import UserError
from megalm.files import write_atomic


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_saved_is_what_was_there_at_the_start(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3).T,
        "b": torch.tensor(True),
        "c": torch.ones(5, dtype=torch.bfloat16),
    }
    saver = Saver(tmp_path, keep=9, asynchronous=True)
    for step in (1, 2):
        wanted = {name: tensor.clone() for name, tensor in tensors.items()}
        saver.start(step, whole(tensors), {"of": step})
        saver.settle()
        for tensor in tensors.values():
            tensor.copy_(torch.zeros(tensor.shape))
        directory = saver.commit()
        back = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
        assert load(directory, whole(back)) == {"of": step}
        assert all(torch.equal(back[name], wanted[name]) for name in wanted)
    saver.close()


def test_the_host_memory_is_taken_once(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=1, asynchronous=True)
    places = set()
    for step in (1, 2, 3):
        saver.start(step, whole({"x": torch.ones(1000)}), {})
        places.add(saver._buffer.data_ptr())
        saver.commit()
    assert len(places) == 1


def held_back(release: threading.Event) -> Any:
    """`writing`, which waits before it writes."""

    def wait(path: Any) -> Any:
        release.wait(60)
        return writing(path)

    return wait


def go_on_while_one_writes(root: Path) -> tuple[list[float], list[bool]]:
    rank = dist.get_rank()
    release = threading.Event()
    if rank == 1:
        writer.writing = held_back(release)  # type: ignore[attr-defined]
    saver = Saver(root, 1, group=dist.group.WORLD, asynchronous=True)
    saver.start(5, [Shard("x", torch.full((4,), float(rank)), (8,), (4 * rank,), (4,))], {})
    if rank == 0:
        wait_until(lambda: saver.progress)
    sums, there = [], []
    for step in range(3):
        if step == 2 and rank == 1:
            release.set()
            wait_until(lambda: saver.progress)
        total = torch.tensor(saver.progress)
        dist.all_reduce(total)
        sums.append(total.item())
        there.append((root / "step-00000005").exists())
    saver.commit()
    there.append((root / "step-00000005").exists())
    saver.close()
    return sums, there


def test_ranks_talk_as_they_like_while_one_of_them_writes_and_the_sum_says_when_all_have(tmp_path: Path) -> None:
    answers = run_ranks(2, go_on_while_one_writes, tmp_path)
    assert answers == [([1.0, 1.0, 2.0], [False, False, False, True])] * 2
    (alone,) = whole({"x": torch.zeros(8)})
    load(tmp_path / "step-00000005", [alone])
    assert alone.tensor.tolist() == [0.0] * 4 + [1.0] * 4


def fail_in_the_background(root: Path) -> tuple[int, str]:
    rank, group = dist.get_rank(), dist.group.WORLD
    shard = Shard("x", torch.ones(1000), (2000,), (1000 * rank,), (1000,))
    save(root, 1, [shard], {}, 1, group)
    saver = Saver(root, 1, group=group, asynchronous=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        saver.start(2, [shard], {})
        if rank == 1:
            wait_until(lambda: saver.progress)
        total = torch.tensor(saver.progress, dtype=torch.float64)
        dist.all_reduce(total)  # a step's
        assert total >= 2
        saver.commit()
    except UserError as error:
        return 1, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return 0, ""


def test_a_write_that_fails_on_one_rank_is_known_to_all_after_the_step_and_leaves_the_others(
    tmp_path: Path,
) -> None:
    answers = run_ranks(2, fail_in_the_background, tmp_path)
    assert answers[0] == answers[1]
    failed, said = answers[0]
    assert failed
    assert "\n" not in said
    assert "rank-00001.safetensors: File too large" in said
    assert "earlier ones are intact" in said
    assert [path.name for path in tmp_path.glob("*step*")] == ["step-00000001"]


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_of_what_several_ranks_hold_each_element_is_written_once_and_all_write_alike(copies: int) -> None:
    dice = random.Random(3)
    tensors = {f"t{i}": torch.zeros(dice.randrange(1, 1400), dice.randrange(1, 1400)) for i in range(20)}
    shards = whole(tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    limit = box_bytes(total)
    assert limit == 4 << 20
    count = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    written = []
    for number in range(copies):
        held = [Shard(s.name, s.tensor, s.shape, s.offset, s.size, True, (number, copies)) for s in shards]
        boxes = spread(held, limit)
        written.append(sum(box.data.nbytes for box in boxes))
        for box in boxes:
            count[box.name][box.region.within(shards[0].region.__class__(shards[0].offset, box.shape))] += 1
    assert all((tensor == 1).all() for tensor in count.values())
    assert max(written) - min(written) <= limit


def read_counted(root: Path, rows: int, columns: int) -> tuple[int, int]:
    """Loads this rank's tile of a grid; gives the bytes that it read and those that it holds."""
    from megalm.checkpoint import reader

    rank, read = dist.get_rank(), 0
    fetched = reader._fetched

    def count(path: Any, start: int, size: int, *rest: Any) -> torch.Tensor:
        nonlocal read
        read += size
        return fetched(path, start, size, *rest)

    reader._fetched = count
    row, column = divmod(rank, columns)
    shape = 4096 // rows, 4096 // columns
    tile = Shard("x", torch.zeros(shape), (4096, 4096), (row * shape[0], column * shape[1]), shape)
    load(root / "step-00000001", [tile], group=dist.group.WORLD)
    wanted = torch.arange(4096.0**2).reshape(4096, 4096)[tile.region.within(tile.region.__class__((0, 0), tile.shape))]
    assert torch.equal(tile.tensor, wanted)
    return read, tile.tensor.nbytes


@pytest.mark.parametrize(("rows", "columns"), [(4, 1), (1, 4), (2, 2)])
def test_a_rank_reads_what_it_holds_whether_rows_or_columns(tmp_path: Path, rows: int, columns: int) -> None:
    save(tmp_path, 1, whole({"x": torch.arange(4096.0**2).reshape(4096, 4096)}), {}, keep=1)
    assert len(read_manifest(tmp_path / "step-00000001").tensors["x"].boxes) == 16
    for read, held in run_ranks(4, read_counted, tmp_path, rows, columns):
        assert held <= read < 1.01 * held


def test_multiples_are_kept_for_ever(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=2, keep_every=20)
    for step in range(5, 75, 5):
        saver.start(step, whole({"x": torch.tensor(step)}), {})
        saver.commit()
    saver.close()
    assert [read_manifest(path).step for path in complete(tmp_path)] == [70, 65, 60, 40, 20]


def test_nothing_is_deleted_before_the_newer_one_is_committed(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=1, asynchronous=True)
    for step in (1, 2):
        saver.start(step, whole({"x": torch.tensor(step)}), {})
        wait_until(lambda: saver.progress)
        if step == 2:
            assert [path.name for path in complete(tmp_path)] == ["step-00000001"]
        saver.commit()
    saver.close()
    assert [path.name for path in complete(tmp_path)] == ["step-00000002"]


# Kills

RANKS = 2


def tensors_of(step: int, rank: int) -> list[Shard]:
    """Tensors that all say which step they are of: a half of each, and what both hold."""
    shards = []
    for i in range(4):
        shards.append(Shard(f"half.{i}", torch.full((64, 64), step), (128, 64), (64 * rank, 0), (64, 64)))
        shards.append(Shard(f"both.{i}", torch.full((64, 64), step), (64, 64), (0, 0), (64, 64), True, (rank, RANKS)))
    return shards


def save_until_killed(root: Path, asynchronous: bool, victim: int, delay: float) -> None:
    """Saves step after step, as training does, and notes what was committed."""
    rank, group = dist.get_rank(), dist.group.WORLD
    found = [read_manifest(path).step for path in complete(root)]
    saver = Saver(root, 2, 7, group, asynchronous)
    first = max(found, default=0) + 1
    for step in range(first, 10**6):
        if step == first + 1 and rank == victim:
            threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        saver.start(step, tensors_of(step, rank), {"step": step})
        done = torch.zeros((), dtype=torch.float64)
        while asynchronous and done < RANKS:
            done.fill_(saver.progress)
            dist.all_reduce(done)
        saver.commit()
        if rank == 0:
            write_atomic(root.parent / "committed", b"%d" % step)


def assert_only_whole_ones(root: Path) -> None:
    committed = root.parent / "committed"
    told = int(committed.read_text())
    steps = []
    for directory in complete(root):
        into = [*tensors_of(-1, 0), *tensors_of(-1, 1)]
        state = load(directory, into)
        steps.append(state["step"])
        assert all((shard.tensor == state["step"]).all() for shard in into)
    assert max(steps) in (told, told + 1)
    assert set(steps) >= set(range(7, told, 7)), "multiples of seven are kept for ever"


@pytest.mark.parametrize(
    ("kills", "asynchronous"),
    [
        (5, True),
        (5, False),
        pytest.param(25, True, marks=pytest.mark.full),
        pytest.param(25, False, marks=pytest.mark.full),
    ],
)
def test_a_rank_that_is_killed_at_a_random_moment_costs_at_most_the_save_under_way(
    tmp_path: Path, kills: int, asynchronous: bool
) -> None:
    root = tmp_path / "checkpoints"
    dice = random.Random(kills + asynchronous)
    for _ in range(kills):
        victim = dice.randrange(RANKS)
        with pytest.raises(RankError) as caught:
            run_ranks(RANKS, save_until_killed, root, asynchronous, victim, dice.uniform(0.0, 0.4), grace=2)
        assert caught.value.failed[0] == victim
        assert_only_whole_ones(root)
    assert max(read_manifest(path).step for path in complete(root)) >= kills
    run_ranks(RANKS, save_once, root)
    assert not list(root.glob(".step-*"))
    shutil.rmtree(root)


def save_once(root: Path) -> None:
    save(root, 10**7, tensors_of(10**7, dist.get_rank()), {"step": 10**7}, 2, dist.group.WORLD)
