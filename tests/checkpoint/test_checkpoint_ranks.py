"""A checkpoint is saved by one number of ranks and loaded by another; whatever happens to one happens to all."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cuts import bits, part, random_tensor, shapes, shards_of
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankError, run_ranks

from megalm import checkpoint
from megalm.checkpoint import DamagedCheckpoint, Shard, latest, load, read_manifest, save, whole
from megalm.checkpoint.ranks import together
from megalm.errors import UserError


def rows(step: int, rank: int, ranks: int) -> list[Shard]:
    """This rank's rows of a 10 x 3 tensor that says which step it is of, and a copy of a scalar."""
    share = -(-10 // ranks)
    start, end = min(10, rank * share), min(10, (rank + 1) * share)
    local = step * 100 + torch.arange(30.0).reshape(10, 3)[start:end].clone()
    scalar = torch.tensor(step)
    return [
        Shard("rows", local, (10, 3), (start, 0), (end - start, 3)),
        Shard("scalar", scalar, (), (), (), primary=rank == ranks - 1),
    ]


def whoami() -> tuple[int, int, Any]:
    return dist.get_rank(), dist.get_world_size(), dist.group.WORLD


def said(act: Callable[[], Any]) -> str:
    """`TypeName: message` of what is raised."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def save_rows(root: Path, *steps: int, state: Any = None) -> None:
    rank, ranks, group = whoami()
    for step in steps:
        save(root, step, rows(step, rank, ranks), state or {"rank": rank}, 9, group)


def load_newest(root: Path) -> tuple[str, bool]:
    """The checkpoint that this rank ends with, and whether all of its shards are that one's."""
    rank, ranks, group = whoami()
    mine = rows(0, rank, ranks)

    def unchanged(found: Any, state: dict[str, Any]) -> None:
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(mine, rows(0, rank, ranks), strict=True))

    found = checkpoint.load_newest(root, mine, group, unchanged)
    assert found is not None
    directory, _ = found
    expected = rows(read_manifest(directory).step, rank, ranks)
    equal = all(torch.equal(a.tensor, b.tensor) for a, b in zip(mine, expected, strict=True))
    return directory.name, equal


@pytest.mark.parametrize(("savers", "loaders"), [(1, 3), (3, 2), (4, 4)])
def test_any_number_of_ranks_loads_what_any_other_saved(tmp_path: Path, savers: int, loaders: int) -> None:
    run_ranks(savers, save_rows, tmp_path, 1, 2)
    directory = tmp_path / "step-00000002"
    assert run_ranks(loaders, load_newest, tmp_path) == [(directory.name, True)] * loaders
    manifest = read_manifest(directory)
    assert manifest.state == {"rank": 0}
    writers = [rank for rank in range(savers) if rank == savers - 1 or rows(1, rank, savers)[0].region.volume]
    assert sorted(manifest.files) == [f"rank-{rank:05d}.safetensors" for rank in writers]
    (alone,) = whole({"rows": torch.zeros(10, 3)})
    load(directory, [alone, *whole({"scalar": torch.tensor(0)})])
    assert torch.equal(alone.tensor, 200 + torch.arange(30.0).reshape(10, 3))


def exchange(root: Path, saved: list[list[Shard]], into: list[list[Shard]]) -> list[Any]:
    rank, _, group = whoami()
    directory = save(root, 1, saved[rank], {}, 1, group)
    load(directory, into[rank], group=group)
    return [bits(shard.data) for shard in into[rank]]


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_shards_in_any_boxes_on_any_ranks_come_back_bit_for_bit(data: st.DataObject) -> None:
    tensor = random_tensor(data.draw(shapes()), data.draw(st.sampled_from(["float32", "bfloat16", "int64"])), 3)
    saved: list[list[Shard]] = [[], [], []]
    into: list[list[Shard]] = [[], [], []]
    for shard in data.draw(shards_of(tensor)):
        first, second = data.draw(st.permutations(range(3)))[:2]
        saved[first].append(shard)
        saved[second].append(replace(shard, primary=False))
    for shard in data.draw(shards_of(tensor)):
        empty = replace(shard, tensor=torch.zeros_like(shard.tensor))
        for rank in data.draw(st.sets(st.integers(0, 2), min_size=1)):
            into[rank].append(empty)
    with tempfile.TemporaryDirectory() as folder:
        loaded = run_ranks(3, exchange, Path(folder), saved, into)
    assert loaded == [[bits(part(tensor, shard.region)) for shard in shards] for shards in into]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [flip_a_byte, Path.unlink])
def test_what_one_rank_finds_damaged_makes_all_go_to_the_one_before(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    run_ranks(3, save_rows, tmp_path, 1, 2)
    harm(tmp_path / "step-00000002" / "rank-00001.safetensors")
    assert run_ranks(3, load_newest, tmp_path) == [("step-00000001", True)] * 3


def test_a_box_that_a_rank_does_not_need_is_not_read_by_it(tmp_path: Path) -> None:
    run_ranks(3, save_rows, tmp_path, 1)
    directory = tmp_path / "step-00000001"
    flip_a_byte(directory / "rank-00001.safetensors")
    first = rows(0, 0, 3)[0]
    load(directory, [first], prefix="rows")
    assert torch.equal(first.tensor, rows(1, 0, 3)[0].tensor)


def save_with_a_limit(root: Path) -> str:
    rank, ranks, group = whoami()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        return said(lambda: save(root, 2, rows(2, rank, ranks), {}, 1, group))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_if_one_rank_cannot_write_all_say_so_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    run_ranks(3, save_rows, tmp_path, 1)
    (answer,) = set(run_ranks(3, save_with_a_limit, tmp_path))
    assert answer.startswith(f"UserError: {tmp_path}/step-00000002: cannot write")
    assert "rank-00001.safetensors: File too large" in answer
    assert [path.name for path in tmp_path.glob("*step*")] == ["step-00000001"]


def die_while_saving(root: Path, victim: int) -> None:
    rank, ranks, group = whoami()
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = fsync
    save(root, 2, rows(2, rank, ranks), {}, 1, group)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_killed_while_saving_leaves_every_earlier_checkpoint(tmp_path: Path, victim: int) -> None:
    run_ranks(3, save_rows, tmp_path, 1)
    with pytest.raises(RankError) as caught:
        run_ranks(3, die_while_saving, tmp_path, victim, timeout=20)
    assert caught.value.failed[0] == victim
    assert latest(tmp_path) == tmp_path / "step-00000001"
    assert run_ranks(3, load_newest, tmp_path) == [("step-00000001", True)] * 3
    run_ranks(3, save_rows, tmp_path, 3)  # which sweeps what is left
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step-00000001", "step-00000003"]


def load_others(directory: Path, case: str) -> str:
    rank, ranks, group = whoami()
    mine = rows(0, rank, ranks)
    if case == "unknown" and rank == 1:
        mine[0] = replace(mine[0], name="row")
    if case == "unused":
        mine = mine[:1]

    def accept(state: dict[str, Any]) -> None:
        if case == "refused" and rank == 1:
            raise UserError(f"not with {state['rank']}")

    message = said(lambda: load(directory, mine, group=group, accept=accept))
    untouched = all(torch.equal(a.tensor, b.tensor) for a, b in zip(mine, rows(0, rank, ranks), strict=False))
    return message if untouched else "changed"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown", "has no tensor 'row', which this run needs. Did you mean 'rows'?"),
        ("unused", "has a tensor 'scalar', for which this run has no use."),
        ("refused", "UserError: not with 0"),
    ],
)
def test_what_one_rank_or_all_together_refuse_is_refused_by_all(tmp_path: Path, case: str, message: str) -> None:
    run_ranks(2, save_rows, tmp_path, 1)
    (answer,) = set(run_ranks(2, load_others, tmp_path / "step-00000001", case))
    assert answer.startswith("UserError: ")
    assert message in answer


def fail_differently(errors: list[BaseException | None], judgement: BaseException | None) -> str:
    def act() -> int:
        if error := errors[dist.get_rank()]:
            raise error
        return dist.get_rank() + 1

    def judge(told: list[int]) -> int:
        if judgement:
            raise judgement
        return sum(told)

    try:
        return str(together(dist.group.WORLD, act, judge))
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("errors", "judgement", "answers"),
    [
        ([None, None], None, ["3", "3"]),
        ([None, DamagedCheckpoint("d")], None, ["DamagedCheckpoint: d"] * 2),
        ([DamagedCheckpoint("d"), UserError("u")], None, ["UserError: u"] * 2),
        ([KeyError(1), UserError("u")], None, ["KeyError: 1", "RuntimeError: KeyError: 1"]),
        ([UserError("u"), KeyboardInterrupt()], None, ["RuntimeError: KeyboardInterrupt: ", "KeyboardInterrupt: "]),
        ([None, None], UserError("j"), ["UserError: j"] * 2),
        ([None, None], KeyError(2), ["KeyError: 2", "RuntimeError: KeyError: 2"]),
    ],
)
def test_ranks_that_act_together_all_succeed_or_all_fail(
    errors: list[BaseException | None], judgement: BaseException | None, answers: list[str]
) -> None:
    assert run_ranks(2, fail_differently, errors, judgement) == answers
