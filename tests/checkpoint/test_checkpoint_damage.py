"""Whatever happens to the files is found before anything is changed, and the file is named."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megalm.checkpoint import DamagedCheckpoint, complete, latest, load, reader, save, whole
from megalm.checkpoint.manifest import MANIFEST

SHARD = "rank-00000.safetensors"


def content(step: int) -> dict[str, torch.Tensor]:
    return {
        "model.weight": torch.full((4, 5), float(step)),
        "model.half": torch.full((3,), step, dtype=torch.bfloat16),
        "mask": torch.arange(5) < step,
        "scalar": torch.tensor(step),
        "empty": torch.zeros(0, 3),
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (1, 2):
        save(tmp_path, step, whole(content(step)), {"loss": 0.1 * step}, keep=3)
    return tmp_path


def assert_refused(directory: Path, named: str) -> None:
    into = content(77)
    with pytest.raises(DamagedCheckpoint) as caught:
        load(directory, whole(into))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(into[name], tensor) for name, tensor in content(77).items())


@pytest.mark.parametrize("name", [MANIFEST, SHARD])
def test_a_flipped_bit_in_any_byte_of_any_file_is_found(root: Path, name: str) -> None:
    path = root / "step-00000002" / name
    intact = path.read_bytes()
    assert len(intact) > 200
    dice = random.Random(1234)
    for position in range(len(intact)):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        assert_refused(path.parent, name)
    path.write_bytes(intact)
    assert load(path.parent, whole(content(0))) == {"loss": 0.2}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def turn_into_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def turn_into_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", [MANIFEST, SHARD])
@pytest.mark.parametrize("harm", [cut, empty, lengthen, turn_into_zeros, turn_into_a_directory, Path.unlink])
def test_a_harmed_file_is_named_and_the_checkpoint_before_is_the_newest(
    root: Path, name: str, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    directory = root / "step-00000002"
    harm(directory / name)
    assert_refused(directory, name)
    if (name, harm) != (SHARD, turn_into_zeros):  # whose size is right; only reading it can tell
        assert latest(root) == root / "step-00000001"
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert name in caplog.text


def test_a_file_of_another_step_is_refused(root: Path) -> None:
    shutil.copy(root / "step-00000001" / SHARD, root / "step-00000002" / SHARD)
    assert_refused(root / "step-00000002", SHARD)
    shutil.copy(root / "step-00000001" / MANIFEST, root / "step-00000002" / MANIFEST)
    assert latest(root) == root / "step-00000001"


def test_with_little_memory_a_file_that_changes_between_two_readings_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = reader._read
    readings = []

    def read_twice(directory: Path, *rest: object) -> object:
        readings.append(directory)
        if len(readings) == 6:
            turn_into_zeros(directory / SHARD)
        return read(directory, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "_read", read_twice)
    monkeypatch.setattr(reader, "LEAST_BATCH", 1)
    monkeypatch.setattr(reader, "_spare_memory", lambda ranks: 1)  # a batch for each tensor
    with pytest.raises(DamagedCheckpoint, match=SHARD):
        load(root / "step-00000002", whole(content(0)))
    assert len(readings) == 6


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert latest(tmp_path / "missing") is None
    (tmp_path / "step-x").mkdir()
    (tmp_path / ".step-00000009.tmp-0123456789abcdef0123456789abcdef").mkdir()
    assert latest(tmp_path) is None


def test_checkpoints_are_found_newest_first_by_number(tmp_path: Path) -> None:
    for step in (2, 10, 9, 123456789):
        save(tmp_path, step, [], {}, keep=9)
    assert [int(path.name.removeprefix("step-")) for path in complete(tmp_path)] == [123456789, 10, 9, 2]
